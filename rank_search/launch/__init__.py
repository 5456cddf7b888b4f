"""Many workers on one study: on this host, on Ray, on Slurm, on Kubernetes. Loads no torch; workers do.

Workers share nothing but the study's database and its working folder, so every engine only has to keep so many equal,
restartable processes alive, each of them one ``rank-search worker``.
"""
