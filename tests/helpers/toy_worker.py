"""A training worker process without Ray around it (tests/helpers/toy_training.py). Light to import."""

import os
import traceback


def serve(rank: int, count: int, pipe) -> None:
    """Answer tasks from a pipe, (job, stop_after) each, until None comes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # DeepSpeed looks for them; nobody connects there
    import torch
    import torch.distributed as dist

    from workflows.runtime import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", 0 if rank == 0 else pipe.recv(), is_master=rank == 0, wait_for_workers=False)
    if rank == 0:
        pipe.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    while (task := pipe.recv()) is not None:
        try:
            pipe.send(_run(rank, count, *task))
        except Exception:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


class _Stopped(Exception):
    pass


def _run(rank: int, count: int, job, stop_after: int | None):
    import gc

    from workflows.train.job import StageError
    from workflows.train.loop import Worker

    events: list[dict] = []

    class Recorded(Worker):
        def tell(self, event: dict) -> None:
            events.append(event)

        def _after_step(self, step: int, meter) -> str:
            why = super()._after_step(step, meter)
            if step == stop_after:
                self.saver.settle()
                raise _Stopped
            return why

    try:
        worker = Recorded(job, rank, count)
        return worker.train(), events
    except StageError as error:
        return str(error), events
    except _Stopped:
        return "stopped", events
    finally:
        worker = None
        gc.collect()
