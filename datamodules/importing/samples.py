"""One shard: a pure function of the staged folder and its number, whichever process computes it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.catalogue import broken_photo
from datamodules.importing.dense import Judged
from datamodules.importing.fetching import fetched
from datamodules.importing.partial import STAGING
from datamodules.importing.records import Done, Failed
from datamodules.importing.staged import Table, open_table
from datamodules.importing.tar import SampleTar, StoredPhotos
from datamodules.photos.decode import PhotoError
from datamodules.photos.files import Photo, Photos, is_web, prepared
from datamodules.photos.options import Failure


@dataclass(frozen=True)
class ShardWriter:
    """What every shard is made from; small, as it travels to other processes.

    products: the staged table; `published` is the file it comes from, for messages.
    folder: where shards are written; its staging/ holds the judgments.
    drop_broken: a photo on disk that cannot be decoded is left out, instead of a ValueError.
    ahead: see fetching.chunks_ahead.
    """

    products: Path
    published: Path
    folder: Path
    fields: list[str]
    labels: list[str]
    shards: int
    photos: Photos
    drop_broken: bool
    max_side: int | None
    quality: int
    ahead: int

    def __call__(self, number: int) -> Done:
        """Writes one shard and its record, or finds that both were written before from the same photos."""
        products, judged = self._open()
        ids, rows = self._products(judged, number)
        wanted = [name for name in ("product_id", "image", *self.fields) if name in products.names]
        cells = products.take(wanted, rows).to_pylist()
        names = [row.pop("image", "").strip() for row in cells]
        signature = self._signature(products, rows, names)
        before = Done.read(self.folder, number)
        if before and before.signature != signature:
            before = None
        if before and self._final(before):
            return before
        path = self.folder / f"{number:05d}.tar"
        final = {photo.row: photo for photo in before.failed if self._is_final(photo)} if before else {}
        photos = self._photos(products, rows, cells, names, StoredPhotos(path if before else None), final)
        places, failed = list[tuple[int, int, bool]](), list[Failed]()
        with SampleTar(path) as tar:
            for id, row, judgments, found in zip(ids.tolist(), cells, judged.of(ids), photos, strict=True):
                product_id = row.pop("product_id")
                record = {"product_id": product_id, "id": id, "texts": row, "judgments": judgments}
                if isinstance(found, Failed):
                    failed.append(found)
                stored = found if isinstance(found, Photo) else None
                places.append((*tar.add(product_id, record, stored), stored is not None))
            Done.forget(self.folder, number)  # it tells of the tar that is replaced now
        offset, size, photo = (np.array(column) for column in zip(*places, strict=True))
        sizes = self.photos.signature([name for name in names if name], times=False)
        done = Done(number, tar.shard(judged.pairs[ids]), signature, sizes, offset, size, photo, failed)
        done.write(self.folder)
        return done

    def _signature(self, products: Table, rows: np.ndarray, names: list[str]) -> str:
        """Raises ValueError, with its place, for a name that leads out of the folder of photos."""
        try:
            return self.photos.signature([name for name in names if name])
        except ValueError:
            for row, name in zip(rows.tolist(), names, strict=True):
                try:
                    self.photos.signature([name] if name else [])
                except ValueError as error:
                    raise products.error(row, f"image: {error}") from error
            raise

    def sizes(self, number: int) -> str:
        """A digest of names and sizes of the photos that the shard's products name: of a copy it is the same."""
        return self.photos.signature(self._named(number), times=False)

    def newest(self, number: int) -> int:
        """When the last of these photos changed; see Photos."""
        return self.photos.newest(self._named(number))

    def _named(self, number: int) -> list[str]:
        products, judged = self._open()
        rows = self._products(judged, number)[1]
        images = products.take(["image"], rows)["image"].to_pylist() if "image" in products.names else []
        return [name for image in images if (name := image.strip())]

    def _open(self) -> tuple[Table, Judged]:
        return open_table(self.products, self.published), Judged.open(self.folder / STAGING, self.labels)

    def _products(self, judged: Judged, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Dense ids and rows of a shard's products."""
        ids = np.array_split(np.arange(len(judged.order)), self.shards)[number]
        return ids, judged.order[ids]

    def _final(self, done: Done) -> bool:
        """Whether another attempt would give the same shard."""
        return all(map(self._is_final, done.failed))

    def _is_final(self, photo: Failed) -> bool:
        return not photo.transient and (not photo.broken or self._drops(photo))

    def _drops(self, photo: Failed) -> bool:
        """Photos by URL are left out up to a limit, which is for the whole import to keep."""
        return self.drop_broken or photo.web

    def _photos(
        self,
        products: Table,
        rows: np.ndarray,
        cells: list[dict[str, str]],
        names: list[str],
        stored: StoredPhotos,
        final: Mapping[int, Failed],
    ) -> Iterator[Photo | Failed | None]:
        """The photo of each product, why there is none, or None where none is named. `final`: failures, by row, that
        are not tried again."""
        ids = [row["product_id"] for row in cells]
        of_products = list(zip(rows.tolist(), ids, names, strict=True))
        missing = [name for row, id, name in of_products if name and row not in final and id not in stored]
        contents = fetched(self.photos, missing, self.ahead)
        for row, id, name in of_products:
            if name and row in final:
                yield final[row]
                continue
            if not name or id in stored:
                yield stored.get(id)
                continue
            yield self._prepared(products, row, id, name, next(contents))

    def _prepared(self, products: Table, row: int, id: str, name: str, content: bytes | Failure) -> Photo | Failed:
        if isinstance(content, Failure):
            return Failed(row, content.reason, content.transient, broken=False, web=is_web(name))
        try:
            return prepared(content, id, self.max_side, self.quality)
        except PhotoError as error:
            failed = Failed(row, error.reason, transient=False, broken=True, web=is_web(name))
            if self._drops(failed):
                return failed
            problem = broken_photo(products, row, name, error)
            raise ValueError(f"{problem}. Replace it, or leave such photos out with on_broken_photo=drop") from error
