"""Run in the environment of osam: its own server, with splitsam as a model of it."""

import sys
from pathlib import Path

import uvicorn
from osam._server import app

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "osam"))

import splitsam_model

from splitsam.client import Client

port, encoder, decoder, token = sys.argv[1:]


class Here(splitsam_model.SplitsamModel):
    def open_client(self) -> Client:
        return Client(encoder, decoder, token=token)


splitsam_model.register(Here)
uvicorn.run(app, host="127.0.0.1", port=int(port))
