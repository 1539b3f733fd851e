"""One call over the network: `call` repeats attempts, each under a permit of the `gate`.

The order is retry(permit(one attempt)): a permit is never held while sleeping. `retry` and
`quota` decide, `transport` is the only file that knows aiohttp's client.
"""
