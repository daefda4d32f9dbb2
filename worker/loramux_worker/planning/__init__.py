"""`loramux plan`: how many GPUs a load needs, and what its requests will wait, from measured costs.

popularity   who asks how much
placement    adapter → partitions → workers: shares of each worker
shape        bytes of a model, of its KV cache and of adapters
costs        what was measured of steps and tiers
caching      hit ratios of the tiers, S3-FIFO in its steady state
batching     sequences in a step and how long it takes
waiting      time to the first token
sizing       the search, and the plan
report, plot the table and the picture
"""
