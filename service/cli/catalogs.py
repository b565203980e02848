"""``chunkplan models`` and ``chunkplan gpus``: what can be named."""

from __future__ import annotations

from service.cli.output import JsonOption, count, gibibytes, print_json, print_table


def models(as_json: JsonOption = False) -> None:
    """List the models of the catalog; any other is given by its folder."""
    from planner.catalog import models as known

    entries = known()
    if as_json:
        fields = ("id", "hf_name", "architecture", "num_parameters", "licence", "source")
        print_json([{name: getattr(entry, name) for name in fields} for entry in entries])
        return
    rows = [(entry.id, count(entry.num_parameters), entry.architecture, entry.hf_name or "") for entry in entries]
    print_table("", ["id", ">parameters", "architecture", "Hugging Face name"], rows)


def gpus(as_json: JsonOption = False) -> None:
    """List the devices of the catalog; any other is given as a JSON object."""
    from planner.catalog import gpus as known

    entries = known()
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in entries])
        return
    rows = [
        (
            gpu.name,
            gibibytes(gpu.memory_bytes),
            f"{gpu.memory_bandwidth / 1e9:,.0f} GB/s",
            f"{gpu.bf16_flops / 1e12:,.0f} TFLOP/s",
            "" if gpu.power_watts is None else f"{gpu.power_watts:,.0f} W",
            "" if gpu.rent_usd_per_hour is None else f"${gpu.rent_usd_per_hour:.2f}/h",
            gpu.compute_capability or "",
        )
        for gpu in entries
    ]
    print_table("", ["id", ">memory", ">bandwidth", ">bf16", ">power", ">rent", ">compute capability"], rows)
