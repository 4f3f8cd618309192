"""The leaf package: pure decision cores and the code that moves weight bytes.

Decide (no I/O, no clock, no randomness): ``types``, ``events``, ``wire``, ``residency``, ``quota``,
``keep``, ``layout``, ``directory``.
Move bytes: ``codec``, ``seal``, ``pack``, ``tiers``.

``packer`` imports neither ``agent`` nor ``control``; both import it.
"""
