"""The local cluster: everything on one machine, under one folder and within 70 ports.

from deploy.local import Cluster

cluster = Cluster(Path(".oncepay"), port_base=8080)
cluster.up()
print(cluster.status().urls["router"])
cluster.down()
"""

from deploy.local.cluster import Cluster, Hooks
from deploy.local.errors import AlreadyRunning, ClusterError, NotRunning, PartFailed, PortTaken, RestoreUndone, WrongHome
from deploy.local.parts import ALL_PARTS
from deploy.local.status import Status

__all__ = [
    "ALL_PARTS",
    "AlreadyRunning",
    "Cluster",
    "ClusterError",
    "Hooks",
    "NotRunning",
    "PartFailed",
    "PortTaken",
    "RestoreUndone",
    "Status",
    "WrongHome",
]
