"""A Ray cluster of several nodes on 127.0.0.1.

Prints its address. Reads `add`, `add FOLDER` (a node that imports from that folder first) or `remove` from standard
input and repeats the word once that is done. Ends with its standard input.
"""

import os
import sys

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # its nodes listen on 127.0.0.1 alone
from ray.cluster_utils import Cluster

NODE = {"include_dashboard": False, "object_store_memory": 80 * 2**20}


def main():
    cores = int(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores, "node_ip_address": "127.0.0.1", **NODE})
    print(cluster.address, flush=True)
    nodes = []
    for line in sys.stdin:
        word, *folder = line.split()
        if word == "add":
            before = os.environ.get("PYTHONPATH", "")
            os.environ["PYTHONPATH"] = os.pathsep.join([*folder, before])
            nodes.append(cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", **NODE))
            os.environ["PYTHONPATH"] = before
        else:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        print(word, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
