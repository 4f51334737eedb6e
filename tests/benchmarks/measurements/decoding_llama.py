"""llama.cpp's side of decoding.py, for an interpreter with xllamacpp: nothing of mlmamba is imported.

    PYTHON decoding_llama.py FILE.gguf THREADS SLOTS

Reads lines of JSON, [rows, tokens of each prompt, new tokens of each], and answers each with [CPU seconds, seconds].
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import xllamacpp


def main() -> None:
    file, threads, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_parallel, params.n_ctx, params.warmup, params.n_gpu_layers = slots, 1024 * slots, True, 0
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server, pool = xllamacpp.Server(params), ThreadPoolExecutor(slots)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        rows, prompt, new = json.loads(line)
        asked = {"prompt": list(range(5, 5 + prompt)), "n_predict": new, "ignore_eos": True, "temperature": 0.0}
        cpu, wall = time.process_time(), time.perf_counter()
        list(pool.map(lambda _, asked=asked: server.handle_completions(asked | {"cache_prompt": False}), range(rows)))
        print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]), flush=True)


if __name__ == "__main__":
    main()
