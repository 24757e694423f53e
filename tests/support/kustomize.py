"""The part of kustomize that deploy/kubernetes uses, so that tests see what a cluster would be given.

Anything else in a kustomization is refused here, so a manifest cannot come to use what no test renders.
tests/deploy/test_kubernetes.py compares it with the real program where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

# Lists that a strategic merge patch merges by a key of their items; all others it replaces.
_MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
}
_KEYS = {"apiVersion", "kind", "namespace", "labels", "resources", "components", "images", "patches"}


def build(folder: Path) -> list[Resource]:
    """What `kustomize build` prints for the folder. ValueError for what this does not know."""
    resources: list[Resource] = []
    _apply(folder, resources)
    return resources


def _apply(folder: Path, resources: list[Resource]) -> None:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(kustomization) - _KEYS:
        raise ValueError(f"{folder}: not understood: {', '.join(sorted(unknown))}")
    for name in kustomization.get("resources", ()):
        path = folder / name
        if path.is_dir():
            _add(resources, build(path))
        else:
            _add(resources, load_all(path))
    for name in kustomization.get("components", ()):
        _apply(folder / name, resources)
    for patch in kustomization.get("patches", ()):
        if set(patch) != {"path"}:
            raise ValueError(f"{folder}: not understood: a patch with {', '.join(patch)}")
        for change in load_all(folder / patch["path"]):
            _patch(resources, change)
    if namespace := kustomization.get("namespace"):
        for resource in resources:
            resource["metadata"]["namespace"] = namespace
    for label in kustomization.get("labels", ()):
        if set(label) - {"pairs", "includeTemplates"}:
            raise ValueError(f"{folder}: not understood: {label}")
        for metadata in _metadata(resources, bool(label.get("includeTemplates"))):
            metadata.setdefault("labels", {}).update(label["pairs"])
    for image in kustomization.get("images", ()):
        if set(image) != {"name", "newTag"}:
            raise ValueError(f"{folder}: not understood: {image}")
        found = [c for resource in resources for c in containers(resource) if c["image"] == image["name"]]
        if not found:
            raise ValueError(f"{folder}: no container runs {image['name']}")
        for container in found:
            container["image"] = f"{image['name']}:{image['newTag']}"


def load_all(path: Path) -> list[Resource]:
    """Every document of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def containers(resource: Resource) -> list[dict[str, Any]]:
    """The containers of a Deployment; none of anything else."""
    if resource["kind"] != "Deployment":
        return []
    found: list[dict[str, Any]] = resource["spec"]["template"]["spec"]["containers"]
    return found


def identity(resource: Resource) -> tuple[str, str]:
    """Kind and name: unique, since everything goes into one namespace."""
    return resource["kind"], resource["metadata"]["name"]


def _add(resources: list[Resource], more: list[Resource]) -> None:
    known = set(map(identity, resources))
    for resource in more:
        if identity(resource) in known:
            raise ValueError(f"{identity(resource)} twice")
        resources.append(resource)


def _patch(resources: list[Resource], change: Resource) -> None:
    for index, resource in enumerate(resources):
        if identity(resource) == identity(change):
            resources[index] = _merge(resource, change)
            return
    raise ValueError(f"a patch for {identity(change)}, which does not exist")


def _merge(base: Any, change: Any, field: str = "") -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        merged = dict(base)
        for key, value in change.items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = _merge(base[key], value, key) if key in base else deepcopy(value)
        return merged
    if isinstance(base, list) and isinstance(change, list) and field in _MERGE_KEYS:
        key = _MERGE_KEYS[field]
        merged_items = {item[key]: item for item in base}
        for item in change:
            name = item[key]
            merged_items[name] = _merge(merged_items[name], item) if name in merged_items else item
        return list(merged_items.values())
    return deepcopy(change)


def _metadata(resources: list[Resource], with_templates: bool) -> Iterator[dict[str, Any]]:
    for resource in resources:
        yield resource["metadata"]
        if with_templates and resource["kind"] == "Deployment":
            yield resource["spec"]["template"].setdefault("metadata", {})
