"""Cases, inputs, error budgets and peers: what the tests, ``verify`` and ``bench`` share."""
