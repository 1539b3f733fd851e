"""Calls over the network: `call` repeats attempts, each admitted by a queue.

The order is retry(admission(one attempt)). `_policy` and `quota` decide. `waiting` is the admission
queue: `admission` and `limits` decide for it when attempts start, from what they learn of rate limits,
concurrency limits and outages. `transport` is the only module that uses aiohttp's client.
"""
