"""The eight colours of experts, as the colour-blind see them, and text on its paper."""

import itertools
import re

import numpy as np
import pytest

from nano_moe.explorer.page import _read

# How linear RGB looks to eyes that lack a cone: Machado et al. 2009, severity 1.
EYES = {
    "full": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
# Linear RGB to OKLab (Ottosson 2020), in which distance is difference to the eye.
CONES = np.array(
    [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.6806995, 0.10739696],
     [0.08830246, 0.28171884, 0.6299787]]
)  # fmt: skip
LAB = np.array(
    [[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.42859221, 0.45059371],
     [0.02590404, 0.78277177, -0.80867577]]
)  # fmt: skip
NOTICED = 0.075  # about four times what eyes just notice


def themes():
    light, dark = re.findall(r":root(?:\[[^]]*\])? \{(.*?)\n\}", _read("style.css"), re.DOTALL)[:2]
    return {"light": dict(variables(light)), "dark": dict(variables(dark))}


def variables(block):
    return re.findall(r"--([\w-]+): (#\w{6});", block)


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return linear(colour) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_experts_can_be_told_apart(theme, eye):
    colours = [themes()[theme][f"e{i}"] for i in range(8)]
    seen = [
        LAB @ np.cbrt(CONES @ np.clip(np.array(EYES[eye]) @ linear(colour), 0, 1))
        for colour in colours
    ]
    closest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert closest > NOTICED


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_paper(theme):
    """A contrast of 4.5 for text (WCAG 2, 1.4.3)."""
    colours = themes()[theme]
    for text in ("ink", "soft", "bad"):
        for ground in ("paper", "raised", "wash"):
            light, dark = sorted((luminance(colours[text]), luminance(colours[ground])))[::-1]
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
