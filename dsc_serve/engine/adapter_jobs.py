"""From an adapter's files to what steps use: the jobs of the thread that loads adapters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

from dsc_kernels import backend
from dsc_kernels.weights import Pair, Place, Update
from dsc_serve.adapter_choice import AdapterAccidentError, AdapterChoice, AdapterInfo, BrokenAdapterError
from dsc_serve.engine.adapter_folder import AdapterFolder, Stamp
from dsc_serve.model.adapter import MODULES, Adapter, BankTenant, SharedBasis, composed, composition_digest
from dsc_serve.parameter_errors import ParameterError


class AdaptedDecoder(Protocol):
    """What makes adapters ready for its layers; see `model.decoder`."""

    @property
    def modules(self) -> Sequence[object]: ...

    def basis(self, pairs: Mapping[Place, Pair]) -> backend.Basis: ...

    def adapter(
        self, updates: Mapping[Place, Update], basis: backend.Basis | None = None, tenant: BankTenant | None = None
    ) -> backend.BoundAdapter: ...

    def summed(self, parts: Sequence[tuple[backend.BoundAdapter, float]]) -> backend.BoundAdapter: ...


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter as steps use it."""

    name: str  # for logs and metrics; a composition's has all names
    digest: str
    kind: str
    rank: int
    modules: int
    weights: backend.BoundAdapter

    read_bytes: int  # that a step with it reads, those of a composition's parts among them
    tuned: bool = False  # whether it is a tenant of the model's bank, or has one among its parts

    @property
    def nbytes(self) -> int:
        """Without its bases, which others may have too."""
        return self.weights.nbytes

    @property
    def basis(self) -> int:
        """By which neighbours in a step are found that share a basis: equal numbers; 0: it has none, or several."""
        bases = self.weights.bases
        return id(bases[0]) if len(bases) == 1 else 0


@dataclass
class Outcome:
    """Of a job: an adapter that is ready, or only read."""

    choice: AdapterChoice
    stamp: Stamp | None = None
    loaded: LoadedAdapter | None = None
    info: AdapterInfo | None = None
    error: ParameterError | None = None


@dataclass
class Looked:
    """Of a job: what some sub-folders are now."""

    stamps: Mapping[str, Stamp | None]


class AdapterJobs:
    """What takes time: nothing here changes what anybody else sees, so that any thread may do it.

    parent: what adapters are told to adapt.
    """

    def __init__(self, folder: AdapterFolder, decoder: AdaptedDecoder, parent: str) -> None:
        self.folder, self.decoder, self.parent = folder, decoder, parent
        self._bases: WeakValueDictionary[Hashable, backend.Basis] = WeakValueDictionary()  # that adapters hold

    def look(self, names: Sequence[str]) -> Looked:
        return Looked({name: self.folder.look(name) for name in names})

    def load(self, choice: AdapterChoice, name: str, ready: bool) -> Outcome:
        """A folder that changes meanwhile is read again when it is asked for again."""
        outcome = Outcome(choice, self.folder.look(name))
        try:
            adapter = self.folder.get(name)
            outcome.info = self._info(adapter)
            if ready:
                outcome.loaded = self._ready(adapter)
        except ParameterError as error:
            outcome.error = error
        except Exception as error:  # such as no memory: the next request may have better luck
            outcome.error = AdapterAccidentError(name, error)
        if self.folder.look(name) != outcome.stamp:
            return Outcome(choice)
        return outcome

    def _ready(self, adapter: Adapter) -> LoadedAdapter:
        try:
            basis = None if adapter.basis is None else self._basis(adapter.basis)
            weights = self.decoder.adapter(adapter.modules, basis=basis, tenant=adapter.tenant)
        except ValueError as error:
            raise BrokenAdapterError(adapter.name, str(error)) from None
        kind, rank, modules = adapter.kind, adapter.rank, adapter.changed
        tuned = adapter.tenant is not None
        return LoadedAdapter(adapter.name, adapter.digest, kind, rank, modules, weights, weights.nbytes, tuned)

    def _basis(self, shared: SharedBasis) -> backend.Basis:
        """The one in memory, if there is any. Raises ValueError."""
        ready = self._bases.get(shared.key)
        if ready is None:
            ready = self._bases[shared.key] = self.decoder.basis(shared.pairs())
        return ready

    def compose(self, choice: AdapterChoice, weighted: Sequence[tuple[LoadedAdapter, float]]) -> Outcome:
        """Adapters with weights as one."""
        try:
            make = self._summed if choice.form == "sum" else self._product_of_sums
            return Outcome(choice, loaded=make("+".join(choice.names), weighted))
        except ParameterError as error:
            return Outcome(choice, error=error)
        except Exception as error:
            return Outcome(choice, error=AdapterAccidentError("+".join(choice.names), error))

    def _summed(self, name: str, weighted: Sequence[tuple[LoadedAdapter, float]]) -> LoadedAdapter:
        digest = composition_digest([(loaded.digest, weight) for loaded, weight in weighted], "sum")
        rank, modules = sum(loaded.rank for loaded, _ in weighted), max(loaded.modules for loaded, _ in weighted)
        read_bytes = sum(loaded.read_bytes for loaded, _ in weighted)
        tenants = [loaded.name for loaded, _ in weighted if loaded.tuned]
        if len(tenants) > 1:
            raise BrokenAdapterError(name, f"{' and '.join(tenants)} are tenants of a bank; a composition may have one")
        weights = self.decoder.summed([(loaded.weights, weight) for loaded, weight in weighted])
        return LoadedAdapter(name, digest, "sum", rank, modules, weights, read_bytes, bool(tenants))

    def _product_of_sums(self, name: str, weighted: Sequence[tuple[LoadedAdapter, float]]) -> LoadedAdapter:
        tenant = next((loaded.name for loaded, _ in weighted if loaded.tuned), None)
        if tenant is not None:
            raise BrokenAdapterError(name, f"{tenant} is a tenant of a bank and has no matrices; compose it by sum")
        return self._ready(
            composed([(self._unpacked(loaded), weight) for loaded, weight in weighted], "product of sums")
        )

    def _unpacked(self, loaded: LoadedAdapter) -> Adapter:
        modules = [(layer, module) for layer in range(len(self.decoder.modules)) for module in MODULES]
        updates = {module: loaded.weights.updates(*module) for module in modules}
        changed = {module: own[0] for module, own in updates.items() if own}
        return Adapter(loaded.name, loaded.digest, loaded.kind, changed, loaded.nbytes, loaded.rank)

    def _info(self, adapter: Adapter) -> AdapterInfo:
        return AdapterInfo(
            name=adapter.name,
            parent=self.parent,
            digest=adapter.digest,
            kind=adapter.kind,
            rank=adapter.rank,
            modules=adapter.changed,
            nbytes=adapter.nbytes,
            basis="" if adapter.basis is None else adapter.basis.digest,
        )
