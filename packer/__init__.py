"""The leaf package: pure decision cores and the code that moves weight bytes.

Decide (no I/O, no clock, no randomness): ``residency`` and its parts ``ledger``, ``queueing``, ``room``,
``upkeep``, ``quota``, ``keep``, ``invariants``, ``proof``; ``layout`` and ``directory``.
Say (shared values and messages): ``types``, ``events``, ``wire``.
Move bytes: ``codec``, ``seal``, ``index``, ``pack``, ``tiers``.
Serve both HTTP surfaces alike: ``http``, ``crowd``, ``doors``. Lend small tools to both: ``database``,
``durable``.

``packer`` imports neither ``agent`` nor ``control``; both import it.
"""
