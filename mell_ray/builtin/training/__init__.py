"""How ``mell-tiny`` was trained. Nothing here is needed to serve it."""
