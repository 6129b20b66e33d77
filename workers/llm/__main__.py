from pipeline.process import run_worker

run_worker("workers.llm.worker")
