"""The documented program, with handlers that wait as long as the tests do."""

import fastapi_app

fastapi_app.PATIENCE = 200.0
app = fastapi_app.app
