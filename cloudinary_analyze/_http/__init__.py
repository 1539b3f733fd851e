"""Calls over the network: `call` repeats attempts, each under a permit.

The order is retry(permit(one attempt)). `_policy` and `quota` decide, `permits` admits, and
`transport` is the only module that uses aiohttp's client.

`waiting`, `admission` and `limits` are the admission queue that will replace `permits`: it learns
rate limits, concurrency limits and outages. Sessions do not use it yet.
"""
