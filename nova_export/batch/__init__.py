"""Many prompts with their seeds to one folder, in this process or on a Ray cluster: `batch.run.run_batch`.

prompts file -> items.py -> Items -> run.py -> those that folder.py lacks -> pools.py or ray_pool.py
-> worker.py, which makes and writes one -> a line in the folder's results.jsonl
"""
