"""
A WebDataset of which only the columns that are used are decoded: a damaged label is no image lost.

In a file of its own, because datasets replaces `open` and the like in the file of a builder.
"""

from datasets.packaged_modules.webdataset.webdataset import EXTENSION_TO_COMPRESSION_FS_FILE_CLS, WebDataset


__all__ = ["PartlyDecoded", "damaged"]


class PartlyDecoded(WebDataset):
    """To become the class of a `WebDataset` builder, whose `used` are then the columns to decode."""

    DECODERS = {}
    used = ()

    def _get_pipeline_from_tar(self, tar_path, tar_iterator):
        # datasets unpacks compressed members even where it decodes none.
        members = ((name, file) for name, file in tar_iterator if not _is_compressed(name) or name.endswith(self.used))
        for example in super()._get_pipeline_from_tar(tar_path, members):
            for column in self.used:
                decode = WebDataset.DECODERS.get(column.split(".")[-1].lower())
                if decode and column in example:
                    try:
                        example[column] = decode(example[column])
                    except Exception as error:  # numpy's, torch's, json's: anything on damaged members
                        raise damaged(tar_path, f"{example['__key__']}.{column}", error) from error
            yield example


def _is_compressed(name: str) -> bool:
    return f".{name.split('.')[-1].lower()}" in EXTENSION_TO_COMPRESSION_FS_FILE_CLS


def damaged(tar_path: str, member: str, error: Exception) -> ValueError:
    message = str(error).splitlines()[0] if str(error) else ""
    return ValueError(
        f"{tar_path}: its member {member} cannot be decoded ({type(error).__name__}: {message}); fix or remove it"
    )
