"""One module per backend; none imports another.

Each has ``unavailable(device)``, ``unsupported(query, key, value, spec, needs_gradient)``, ``forward`` and
``backward``; the residuals between the last two are ``(out, lse)`` everywhere, so any forward pairs with any
backward.
"""
