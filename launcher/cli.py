"""The command line, read off the dataclasses of `pipeline.config`, and the start of the supervisor.

The only place that reads the environment; `environment.py` interprets it.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import tempfile
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher.adapters import check_adapters
from launcher.api_keys import VARIABLE, hide, with_keys
from launcher.checkpoints import find_model
from launcher.config_size import check_size
from launcher.doctor.command import examine
from launcher.environment import PLACES_OF_HUBS, cache_folder, home_folder, run_dir_base, workers_environment
from launcher.gpu_sharing import gpu_sharing
from launcher.memory import warn_of_memory
from launcher.node_address import with_addresses
from launcher.node_agent import NodeAgent
from launcher.node_environment import Node, read_node
from launcher.picture_size import limit_pictures
from launcher.run_dir import RunDir
from launcher.service_manager import VARIABLE as MANAGER
from launcher.service_manager import ServiceManager
from launcher.stored_weights import check_files, check_weights
from launcher.supervisor import Supervisor
from pipeline.config import Config
from pipeline.config.tls import ssl_context
from pipeline.parsers.registry import check_names
from pipeline.process import faults, log
from pipeline.process.otlp import check_available

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launcher",
        description="Serves a Qwen-VL model: image work and token generation in processes of their own.",
        allow_abbrev=False,
    )
    for section in dataclasses.fields(Config):
        role = typing.get_type_hints(Config)[section.name]
        hints = typing.get_type_hints(role)
        group = parser.add_argument_group(section.name)
        for field in dataclasses.fields(role):
            if field.metadata and (field.name != "fault" or faults.are_available()):
                _add_option(group, field, hints[field.name])
    return parser


def _add_option(group: argparse._ArgumentGroup, field: dataclasses.Field[object], hint: object) -> None:
    names = [f"--{field.name.replace('_', '-')}", *field.metadata["aliases"]]
    text = field.metadata["help"]
    if field.default not in (None, "", (), False):
        text += f" (default: {field.default})"
    if hint is bool:
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        group.add_argument(*names, dest=field.name, action=action, default=field.default, help=text)
        return
    is_optional = isinstance(hint, types.UnionType)
    plain = next(part for part in typing.get_args(hint) if part is not type(None)) if is_optional else hint
    is_list = typing.get_origin(plain) is tuple
    # An option with a list that is given again adds to the list, unless there is one without it.
    adds = is_list and field.default == ()
    group.add_argument(
        *names, dest=field.name, type=str if is_list else typing.cast(type, plain),
        default=[] if adds else field.default, action="extend" if adds else "store", help=text,
        nargs="+" if is_list else None, choices=field.metadata["choices"] or None,
        metavar=field.metadata["metavar"] or None,
    )  # fmt: skip


def parse(arguments: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Exits with a message that names the option when one is unknown or out of range.

    The environment says which node this is where there is a token, and no --nnodes: so whatever else starts
    processes on several nodes changes nothing.
    """
    parser = build_parser()
    parser.set_defaults(nnodes=None)
    values = vars(parser.parse_args(arguments))
    if values["nnodes"] is None:
        values["nnodes"] = 1
        if values["node_token_file"]:
            try:
                _take_node(values, read_node(environment))
            except ValueError as error:
                parser.error(str(error))
    parts = {}
    for section in dataclasses.fields(Config):
        role = typing.get_type_hints(Config)[section.name]
        chosen = {
            field.name: values[field.name] for field in dataclasses.fields(role) if field.name in values
        }
        try:
            parts[section.name] = role(
                **{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
            )
        except ValueError as error:
            parser.error(str(error))
    try:
        return Config(**parts)
    except ValueError as error:
        parser.error(str(error))


def _take_node(values: dict[str, Any], node: Node | None) -> None:
    if node is None:
        return
    values.update(nnodes=node.nnodes, node_rank=node.node_rank)
    values["master_addr"] = values["master_addr"] or node.master_addr
    if node.master_port is not None:
        values["master_port"] = node.master_port


def examine_machine(arguments: Sequence[str]) -> int:
    """What `python -m launcher.doctor` does."""
    return examine(arguments, os.environ)


def place(config: Config) -> int:
    """Has others start the launchers, and returns when they have ended."""
    from launcher.ray_placement import RayPlacement  # here: few have Ray

    return RayPlacement(config, {VARIABLE: os.environ.pop(VARIABLE, "")}, Path.cwd()).run()


def main(arguments: Sequence[str]) -> int:
    config = parse(arguments, os.environ)
    hide([key for key in (*config.api.api_key, config.api.admin_key, config.preprocess.media_proxy) if key])
    log.configure("launcher", config.launcher.log_level)
    try:
        if config.cluster.is_placed:
            return place(config)
        # Removed from the environment: workers do not need them.
        config = dataclasses.replace(config, api=with_keys(config.api, os.environ.pop(VARIABLE, "")))
        manager = ServiceManager(os.environ.pop(MANAGER, ""))
        check_size(config)
        ssl_context(config.api)  # raises for files that cannot be used, before anything starts
        home = home_folder(os.environ)
        if home is None and config.launcher.cache_dir:
            os.environ["HOME"] = config.launcher.cache_dir  # where hubs' clients keep downloads
        can_keep = home is not None or any(os.environ.get(name) for name in ("HOME", *PLACES_OF_HUBS))
        check_available(config.launcher.otlp_traces_endpoint)
        config = dataclasses.replace(config, cluster=with_addresses(config.cluster))
        check_names(config.api.tool_call_parser, config.api.reasoning_parser)
        model = find_model(config.model, can_keep)
        check_weights(config, model.folder)
        check_files(model.folder)
        base = Path("/") if config.launcher.run_dir else run_dir_base(os.environ, Path(tempfile.gettempdir()))
        with RunDir(config.launcher.run_dir, base) as run_dir:
            cache = cache_folder(config.launcher.cache_dir, os.environ, home, run_dir)
            named = dataclasses.replace(config.model, served_model_name=model.names)
            located = dataclasses.replace(config.launcher, cache_dir=str(cache))
            config = dataclasses.replace(config, model=named, launcher=located)
            config = limit_pictures(config, model.folder, os.environ)
            config = check_adapters(config, model.folder)
            warn_of_memory(config, model.folder)
            with gpu_sharing(config, run_dir, workers_environment(os.environ, home, cache)) as environment:
                launcher = Supervisor if config.cluster.is_head else NodeAgent
                return launcher(config, model, run_dir, environment, manager).run()
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130
