"""What a compiled kernel's machine code says of it: registers, spills, loads, matrix instructions, copies in flight.

The tools (disassembler, cuobjdump) come inside Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

WAIT = r"(?<!WARPGROUP\.)\bDEPBAR\.LE SB0, (0x[0-9a-f]+)"


def amd_figures(assembly: str) -> dict[str, int]:
    fields = {name: int(value) for name, value in re.findall(r"\.([sv]gpr_\w+):\s*(\d+)", assembly)}
    return {
        "registers": fields["vgpr_count"],
        "spills": fields["vgpr_spill_count"] + fields["sgpr_spill_count"],
        "wide_loads": len(re.findall(r"^\s*(?:global|buffer)_load_(?:lds_)?dwordx4\b", assembly, re.MULTILINE)),
        "matrix_instructions": len(re.findall(r"^\s*v_mfma_", assembly, re.MULTILINE)),
        **dict.fromkeys(("warpgroup_instructions", "loop_shuffles", "copies_in_flight"), 0),
    }


def product_loops(code: str) -> list[str]:
    """The innermost loops of disassembled code that hold matrix instructions."""
    lines, labels, loops = code.splitlines(), dict[str, int](), []
    for at, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = at
        elif (back := re.search(r"\bBRA\S* .*`\((\.L_x_\d+)\)", line)) and back[1] in labels:
            loops.append((labels[back[1]], at))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    bodies = ["\n".join(lines[a:b]) for a, b in inner]
    return [body for body in bodies if re.search(r"\bH(?:G)?MMA[.\s]", body)]


def nvidia_figures(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool.path, flag, file.name], check=True, capture_output=True, text=True).stdout
            for tool, flag in ((knobs.nvidia.cuobjdump, "-res-usage"), (knobs.nvidia.nvdisasm, "-c"))
        )
    registers, loops = re.search(r"REG:(\d+)", usage), product_loops(code)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage!r}")
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)[.\s]", code)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E[\w.]*\.128\b", code)),
        "matrix_instructions": len(re.findall(r"\b(?:HGMMA|HMMA)[.\s]", code)),
        "warpgroup_instructions": len(re.findall(r"\bHGMMA[.\s]", code)),
        "loop_shuffles": sum(len(re.findall(r"\bSHFL[.\s]", loop)) for loop in loops),
        "copies_in_flight": max((int(left, 16) for left in re.findall(WAIT, "".join(loops) or code)), default=0),
    }
