"""The addresses of the head and of this node, found by name or by the way to the head."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket

from pipeline.config.cluster import ClusterConfig


def with_addresses(cluster: ClusterConfig) -> ClusterConfig:
    """With `master_addr` and `node_address` as numbers. Raises ValueError for a name that is unknown, or for
    an address that means every interface."""
    if not cluster.has_nodes:
        return cluster
    head = _resolved("master_addr", cluster.master_addr)
    if cluster.node_address:
        own = _resolved("node_address", cluster.node_address)
    else:
        own = head if cluster.is_head else _own_address(head, cluster.master_port)
    return dataclasses.replace(cluster, master_addr=head, node_address=own)


def _resolved(option: str, host: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{option} {host!r} cannot be resolved: {error.strerror}") from None
    address = str(found[0][4][0])
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        raise ValueError(f"{option} {host!r} means every interface: name the address of one")
    return address


def _own_address(head: str, port: int) -> str:
    """Of the interface that leads to the head; nothing is sent."""
    family = socket.AF_INET6 if ":" in head else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((head, port))
        except OSError as error:
            raise ValueError(f"no way leads to the head at {head}: {error.strerror}") from None
        return str(probe.getsockname()[0])
