"""The models of a server: loaded when the first request names one, closed where another one needs the memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from overspill._core import Error, ModelLoadError, UnusableError
from overspill.base.units import parse_bytes, parse_memory
from overspill.cascade.cascade import CASCADE
from overspill.cascade.stream import Which
from overspill.engine.model import Model
from overspill.header.info import ModelInfo
from overspill.machine.devices import add_rpc_servers, by_device, devices, devices_for_layers
from overspill.machine.hardware import Hardware
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast
from overspill.planning.offload import place_and_forecast
from overspill.server.errors import ApiError

__all__ = ["Models", "Served"]

logger = logging.getLogger("overspill")


@dataclass(eq=False, slots=True)
class Served:
    """A model that requests can name."""

    name: str
    file: Path
    model: Model | None = None
    loading: asyncio.Task[None] | None = None
    n_users: int = 0
    """Requests that use it now."""
    used_at: float = 0.0
    """When the last of them ended."""


class Models:
    """Models by name. One is loaded at a time; the others answer meanwhile.

    Parameters
    ----------
    files
        The file of each name.
    cascades
        Names of pairs, as :meth:`pair` takes them, that are listed beside the models. Others can be asked as well.
    read
        Returns the header of a file, with the values that replace its own.
    options
        Keywords of :class:`Model`, for all of them.
    tell
        Called with a line when a model is loaded or closed.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        cascades: Sequence[str],
        read: Callable[[Path], ModelInfo],
        options: Mapping[str, Any],
        tell: Callable[[str], None] = logger.info,
    ) -> None:
        """Load nothing yet."""
        self.created = int(time.time())
        self.served = {name: Served(name, file) for name, file in files.items()}
        self.cascades = cascades
        self._read, self._options, self._tell = read, dict(options), tell
        self._one_at_a_time = asyncio.Lock()
        self._released = asyncio.Event()
        self._may_begin = asyncio.Event()
        """Unset while a model waits for the memory of others: what begins with these waits for it."""
        self._may_begin.set()
        self._ends = False

    def named(self, name: str) -> Served:
        """Return a model; without a name the only one, or the one that is loaded. An :class:`ApiError` if none is."""
        if name in self.served:
            return self.served[name]
        if not name:
            loaded = [one for one in self.served.values() if one.model is not None]
            found = loaded or [*self.served.values()]
            if len(found) == 1:
                return found[0]
        known = ", ".join([*self.served][:5])
        raise ApiError(
            404, f"there is no model {name!r:.100} here; /v1/models lists them: {known}", param="model",
            code="model_not_found",
        )  # fmt: skip

    def pair(self, name: str) -> dict[Which, str] | None:
        """Return the models of a ``cascade:SMALL,LARGE``; None for another name. An :class:`ApiError` if none is."""
        if not name.startswith(CASCADE):
            return None
        parts = name.removeprefix(CASCADE).split(",")
        pairs = [(",".join(parts[:i]), ",".join(parts[i:])) for i in range(1, len(parts))]  # names may have commas
        if not all(parts) or not pairs:
            raise ApiError(
                404,
                f"cascades are named {CASCADE}SMALL,LARGE, not {name!r:.100}",
                param="model",
                code="model_not_found",
            )
        small, large = next((pair for pair in pairs if {*pair} <= self.served.keys()), pairs[0])
        return {"small": self.named(small).name, "large": self.named(large).name}

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[Model]:
        """Yield a model, which is loaded first if it is not; it stays until the block is left."""
        one = self.named(name)
        if one.model is not None:
            await self._may_begin.wait()
        one.n_users += 1
        try:
            while (model := one.model) is None:
                if one.loading is None or one.loading.done():
                    one.loading = asyncio.create_task(self._load(one))
                    one.loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may wait
                await asyncio.shield(one.loading)  # others may wait for it
            try:
                yield model
            except UnusableError as error:
                if one.model is model:
                    one.model = None
                    self._tell(f"closing {one.name}, which the next request loads again: {error}")
                    await asyncio.to_thread(model.close)
                raise
        finally:
            one.n_users -= 1
            one.used_at = time.monotonic()
            self._released.set()

    async def _load(self, one: Served) -> None:
        info = await asyncio.to_thread(self._read, one.file)
        async with self._one_at_a_time:
            try:
                while not await self._has_room(info, one):
                    self._may_begin.clear()  # or those that are in use would stay so for ever
                    await self._released.wait()
                    if one.n_users == 0:
                        raise ApiError(503, f"nobody waits for {one.name} any more")
            finally:
                self._may_begin.set()
            self._tell(f"loading {one.name}")
            start = time.perf_counter()
            options = {**self._options, "progress": lambda share: not self._ends}
            try:
                one.model = await asyncio.to_thread(lambda: Model(info, **options))
            except ModelLoadError as error:
                raise ApiError(503, str(error), param="model") from None
            self._tell(f"loaded {one.name} in {time.perf_counter() - start:.1f} s")

    async def _has_room(self, info: ModelInfo, one: Served) -> bool:
        """Close models that nobody uses until there is room for one more; False if those that are used take it."""
        while True:
            self._released.clear()
            _, forecast = await asyncio.to_thread(self._planned, info)
            others = [other for other in self.served.values() if other.model is not None and other is not one]
            if forecast.verdict != "does not fit" or not others:
                return True
            idle = [other for other in others if other.n_users == 0]
            if not idle:
                return False
            oldest = min(idle, key=lambda other: other.used_at)
            self._tell(f"closing {oldest.name}, which leaves its memory to {one.name}")
            model, oldest.model = oldest.model, None
            if model is not None:
                await asyncio.to_thread(model.close)

    def _planned(self, info: ModelInfo) -> tuple[Placement, Forecast]:
        """Return the placement and the forecast of a model beside those that are loaded."""
        add_rpc_servers(self._options.get("rpc") or ())
        sizes = parse_memory(self._options.get("memory"))
        memory = by_device("memory", sizes, devices_for_layers(devices())) if sizes else {}
        hardware = Hardware.here(info, memory=memory, n_threads=self._options.get("n_threads"), measure=False)
        is_mapped = self._options.get("load_mode", "mmap") in ("mmap", "mmap+mlock")
        cache_bytes = parse_bytes("prompt_cache", self._options.get("prompt_cache", 0))
        taken = Counter({hardware.cpu.name: cache_bytes})
        loaded = [model for one in self.served.values() if (model := one.model) is not None]
        for model in loaded:
            taken[hardware.cpu.name] += cache_bytes - model.prompt_cache_bytes  # which it may fill yet
            for name, use in model.memory.items():
                if name in memory:
                    taken[name] += use.total_bytes
                elif name == hardware.cpu.name and is_mapped:
                    # The system calls memory with mapped files available, since it could read them again.
                    taken[name] += use.weights_bytes
        return place_and_forecast(info, hardware.without(taken), self._options)

    async def plan(self, name: str) -> dict[str, Any]:
        """Return what is expected of a model that is not loaded, or where the weights of a loaded one are.

        A cascade has that of both its models.
        """
        if pair := self.pair(name):
            return {
                "model": name,
                "cascade": {which: await self._plan(self.served[one]) for which, one in pair.items()},
            }
        return await self._plan(self.named(name))

    async def _plan(self, one: Served) -> dict[str, Any]:
        if (model := one.model) is not None:
            memory = {device: asdict(use) for device, use in model.memory.items()}
            return {"model": one.name, "loaded": True, "placement": model.placement.to_dict(), "memory": memory}
        info = await asyncio.to_thread(self._read, one.file)
        placement, forecast = await asyncio.to_thread(self._planned, info)
        return {"model": one.name, "loaded": False, "placement": placement.to_dict(), "forecast": forecast.to_dict()}

    async def close(self) -> None:
        """Close all that are loaded, and load no more."""
        self._ends = True
        for one in self.served.values():
            if one.loading is not None:
                await asyncio.gather(one.loading, return_exceptions=True)
            model, one.model = one.model, None
            if model is not None:
                try:
                    await asyncio.to_thread(model.close)
                except Error as error:
                    logger.warning("%s could not be closed: %s", one.name, error)
