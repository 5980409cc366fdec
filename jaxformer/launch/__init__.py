"""Starting `train.py` on many processes: here, as a rehearsal, or by a file for a scheduler.

`local.py` starts and watches processes of this machine. `job.py` is the one description of a job;
`render.py` makes files of it for SLURM, Kubernetes and TPU pods, `rehearse.py` a small copy here.
"""
