"""Calls over the network: `call` builds and reads them, `attempts` sends and repeats them.

The order is retry(admission(one attempt)). `_policy` and `quota` decide. `waiting` is the admission
queue: `admission` and `limits` decide for it when attempts start, from what they learn of rate limits,
concurrency limits and outages. `transport` is the only module that uses aiohttp's client.
"""
