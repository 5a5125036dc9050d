# SPDX-License-Identifier: Apache-2.0
"""Typed JSON: tags, fields, contents, dtypes, shapes, keys."""

from __future__ import annotations

from attacks.kit import Attack, Make, each


def value(text: str, blob: bytes = b"") -> Make:
    """An object of the state, `extra`, is this; `@` stands for where its blob begins."""
    return lambda target: target.newest.put_object(f'{{"a":{text}}}', blob)


BAD: dict[str, str] = {
    "a tag that there is not": '{"!":"object","v":1}',
    "a tag that is a number": '{"!":5}',
    "a tag that is null": '{"!":null}',
    "a tag that is a list": '{"!":["int"],"v":"1"}',
    "a tag without fields": '{"!":"int"}',
    "a tag with a field too many": '{"!":"int","v":"1","w":1}',
    "an int of nothing": '{"!":"int","v":""}',
    "an int in capitals": '{"!":"int","v":"FF"}',
    "an int with an underscore": '{"!":"int","v":"f_f"}',
    "an int with a plus": '{"!":"int","v":"+f"}',
    "an int with a newline": '{"!":"int","v":"f\\n"}',
    "an int of a number": '{"!":"int","v":5}',
    "a float of three bytes": '{"!":"float","v":"7ff000"}',
    "a float of spaces": '{"!":"float","v":"7f f0 00 00 00 00 00 00"}',
    "a complex of eight bytes": '{"!":"complex","v":"7ff0000000000000"}',
    "a string of half a byte": '{"!":"str","v":"f"}',
    "a string that is no UTF-8": '{"!":"str","v":"ff"}',
    "bytes outside the blob": '{"!":"bytes","offset":0,"bytes":1000000000}',
    "bytes at a negative offset": '{"!":"bytes","offset":-1,"bytes":1}',
    "bytes of a fraction": '{"!":"bytes","offset":0.0,"bytes":1}',
    "bytes of a truth": '{"!":"bytes","offset":false,"bytes":true}',
    "bytes of an endless number": '{"!":"bytes","offset":0,"bytes":' + "9" * 4000 + "}",
    "a tuple of a number": '{"!":"tuple","v":5}',
    "a set of lists": '{"!":"set","v":[[]]}',
    "a set of the same twice": '{"!":"set","v":[1,1]}',
    "a set of 1 and true": '{"!":"set","v":[1,true]}',
    "a set of tensors": '{"!":"set","v":[{"!":"tensor","dtype":"float32","shape":[0],"offset":0,"bytes":0}]}',
    "a dict of triples": '{"!":"dict","v":[[1,2,3]]}',
    "a dict of a list as a key": '{"!":"dict","v":[[[],1]]}',
    "a dict of a key twice": '{"!":"dict","v":[[1,1],[1,2]]}',
    "a Counter of a number": '{"!":"Counter","v":5}',
    "a Namespace with a number for a name": '{"!":"Namespace","v":[[5,1]]}',
    "a defaultdict of eval": '{"!":"defaultdict","of":"eval","v":[]}',
    "a defaultdict of a list": '{"!":"defaultdict","of":["list"],"v":[]}',
    "a deque that is too short": '{"!":"deque","max":1,"v":[1,2]}',
    "a deque of a negative length": '{"!":"deque","max":-1,"v":[]}',
    "a deque of an endless length": '{"!":"deque","max":99999999999999999999,"v":[]}',
    "a slice of two": '{"!":"slice","v":[1,2]}',
    "a range by nothing": '{"!":"range","v":[0,1,0]}',
    "a range of words": '{"!":"range","v":["a",1,1]}',
    "a vector of floats of four bytes": '{"!":"vector","of":"list","dtype":"<f4","offset":0,"bytes":0}',
    "a vector of a set": '{"!":"vector","of":"set","dtype":"<i8","offset":0,"bytes":0}',
    "a numpy scalar of an object": '{"!":"np","dtype":"|O","v":"00"}',
    "a numpy scalar of a record": '{"!":"np","dtype":"|V8","v":"0000000000000000"}',
    "a numpy scalar of another size": '{"!":"np","dtype":"<f8","v":"00"}',
    "a numpy scalar of no dtype": '{"!":"np","dtype":"x","v":"00"}',
    "a numpy scalar of a list of dtypes": '{"!":"np","dtype":[["a","<i4"]],"v":"00"}',
    "an array of objects": '{"!":"array","dtype":"|O","shape":[1],"offset":0,"bytes":8}',
    "an array of a shape that overflows": (
        '{"!":"array","dtype":"<f8","shape":[4294967296,4294967296,0],"offset":0,"bytes":0}'),
    "an array of a negative shape": '{"!":"array","dtype":"<f8","shape":[-1],"offset":0,"bytes":0}',
    "an array of a hundred dimensions": '{"!":"array","dtype":"|u1","shape":[' + "1," * 99 + '1],"offset":0,"bytes":1}',
    "an array of strings of a gigabyte": '{"!":"array","dtype":"<U999999999","shape":[0],"offset":0,"bytes":0}',
    "a tensor of no dtype": '{"!":"tensor","dtype":"float","shape":[0],"offset":0,"bytes":0,"x":1}',
    "a tensor of a quantized dtype": '{"!":"tensor","dtype":"qint8","shape":[0],"offset":0,"bytes":0}',
    "a tensor of another size": '{"!":"tensor","dtype":"float32","shape":[2],"offset":0,"bytes":4}',
    "a tensor of an endless shape":
        '{"!":"tensor","dtype":"float32","shape":[' + "9" * 4000 + ',0],"offset":0,"bytes":0}',
    "a tensor of a million dimensions":
        '{"!":"tensor","dtype":"uint8","shape":[' + "1," * 999_999 + '1],"offset":0,"bytes":1}',
    "a dtype that there is not": '{"!":"dtype","v":"os"}',
    "a device that there is not": '{"!":"device","type":"warp","index":null}',
    "a device of a large index": '{"!":"device","type":"cuda","index":128}',
    "a device of a name with a colon": '{"!":"device","type":"cuda:0","index":null}',
    "a Size of words": '{"!":"Size","v":["a"]}',
    "a Size of a large number": '{"!":"Size","v":[9223372036854775808]}',
    "an object with a key twice": '{"a":1,"a":2}',
    "an object that begins a tag and ends it twice": '{"!":"int","!":"int","v":"1"}',
    "a number that is too large": "1e400",
    "NaN": "NaN",
    "a lone surrogate": '"\\ud800"',
    "a key of a lone surrogate": '{"\\udfff":1}',
    "a control character": '"\x01"',
}  # fmt: skip


def attacks() -> list[Attack]:
    return [
        *each("value", {name: value(text) for name, text in BAD.items()}),
        *each("value", {
            "contents that overlap to more than the blob": value(
                '[{"!":"bytes","offset":@,"bytes":6},{"!":"bytes","offset":@,"bytes":6}]', b"abcdef"),
            "contents with a gap before them": value('{"!":"bytes","offset":@,"bytes":3}', b"abcdef"),
        }, expect="any"),
    ]  # fmt: skip
