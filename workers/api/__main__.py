from pipeline.process import run_worker

run_worker("workers.api.worker")
