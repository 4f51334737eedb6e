"""llama.cpp's server on a GGUF file, for tests and benchmarks beside it. Run by a Python with xllamacpp:

PYTHON llama_server.py FILE.gguf THREADS [SLOTS]

Prints one line of JSON with the server's address, and serves until its input ends.
"""

import json
import sys

import xllamacpp

CONTEXT = 4096  # tokens of a slot


def main() -> None:
    file, threads, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT * slots, slots, 0
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.endpoint_slots, params.warmup, params.cache_prompt = True, True, True
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address, "build": xllamacpp.BUILD_INFO}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
