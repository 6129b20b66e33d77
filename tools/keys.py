"""Makes the keys by which a server and its clients on other machines know each other.

    python -m tools.keys server KEYS           # once: the server's own pair
    python -m tools.keys client KEYS alice     # for each client: prints the folder to take to its machine

Then `python -m launcher --direct-port 5555 --direct-host 0.0.0.0 --direct-keys KEYS` serves whoever has one
of the keys in KEYS/clients. The server looks there whenever somebody connects: a new client is served at
once, and one whose file is gone is not served when it next connects.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.transport.keys import make_client_keys, make_server_keys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text in (("server", "a server's keys"), ("client", "a client's keys")):
        command = kinds.add_parser(kind, help=text)
        command.add_argument("folder", type=Path, metavar="KEYS", help="the server's folder of keys")
        if kind == "client":
            command.add_argument("name", help="of the client: letters, digits, '-', '_' and '.'")
    args = parser.parse_args()
    try:
        if args.kind == "server":
            make_server_keys(args.folder)
            print(f"the server's keys are in {args.folder}")
        else:
            given = make_client_keys(args.folder, args.name)
            print(
                f"take {given} to the client's machine and delete it here: it holds the client's secret key"
            )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
