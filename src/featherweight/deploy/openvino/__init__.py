"""OpenVINO as a target."""

from featherweight.deploy.openvino import profile as profile  # registers how its files are profiled
