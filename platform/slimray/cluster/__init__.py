"""Run jobs elsewhere: Jobs API, KubeRay, Slurm, `ray up`, raylets on this machine."""
