import sys

try:
    from launcher.cli import examine_machine
except ModuleNotFoundError as missing:
    sys.exit(f"the package {missing.name} is missing: install vlm-pipeline with pip")

sys.exit(examine_machine(sys.argv[1:]))
