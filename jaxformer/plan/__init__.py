"""A rehearsal before the cluster: the real training step, compiled for hardware that is not here.

`target` reads what a person asks for, `worker` compiles it in a process of its own, `hlo` counts
what the compiled program does, `estimate` turns counts into time, `search` looks for a change that
makes a step fit, and `command` says it all on a page.
"""
