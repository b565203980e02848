"""``python -m engine.worker``: the short name of :mod:`chunkplan.engine.worker`."""

from chunkplan.engine.worker import start

if __name__ == "__main__":
    start()
