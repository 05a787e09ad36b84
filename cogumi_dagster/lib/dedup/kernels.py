"""The inner loops of near-duplicate removal, compiled by numba and run without Python's lock.

Texts lie end to end in one array of UTF-8 bytes. A shingle of up to 3 characters is coded exactly (3 x 21 bits), so
that equal codes mean equal shingles; a longer one is a 64-bit polynomial hash of its characters. A text shorter than a
shingle is padded with NUL. Compiled once, then read from numba's cache.
"""

import numpy as np
from numba import njit
from numba.extending import intrinsic

STEP_EXACT = np.uint64(1 << 21)
STEP_HASH = np.uint64(0x9E3779B97F4A7C15)
RECENT = 4096
"""Hashes remembered while a text is signed. A repeated one changes no minimum; most are left out by this, which halves
the work, and one that was forgotten does no harm."""
PLAIN = np.arange(256, dtype=np.uint8)
"""Each byte as a normalised text has it: ASCII letters in lower case, ASCII whitespace as a space."""
PLAIN[65:91] += 32
PLAIN[[9, 10, 11, 12, 13, 28, 29, 30, 31]] = 32


@njit(nogil=True, cache=True)
def squeeze(raw, starts, out, lengths):  # type: ignore[no-untyped-def]
    """ASCII letters to lower case, runs of ASCII whitespace to one space, none at the ends; other bytes as they are.

    Text ``i`` is ``raw[starts[i]:starts[i+1]]``. Fills ``out`` (bytes, end to end) and ``lengths``; returns the bytes.
    """
    at = np.int64(0)
    for text in range(len(starts) - 1):
        begin = at
        after_gap = np.uint8(1)
        for place in range(starts[text], starts[text + 1]):  # no branch: words are too short to be predicted
            byte = PLAIN[raw[place]]
            gap = np.uint8(byte == 32)
            out[at] = byte
            at += 1 - (gap & after_gap)
            after_gap = gap
        if at > begin:
            at -= after_gap
        lengths[text] = at - begin
    return at


@njit(nogil=True, cache=True)
def _points(flat, begin, end, size, points):  # type: ignore[no-untyped-def]
    """Code points of UTF-8 bytes, padded with NUL to ``size``; returns how many."""
    count = 0
    place = begin
    while place < end:
        byte = np.uint32(flat[place])
        if byte < 0x80:
            points[count] = byte
            place += 1
        elif byte < 0xE0:
            points[count] = (byte & 0x1F) << 6 | np.uint32(flat[place + 1]) & 0x3F
            place += 2
        elif byte < 0xF0:
            high = (byte & 0xF) << 12 | (np.uint32(flat[place + 1]) & 0x3F) << 6
            points[count] = high | np.uint32(flat[place + 2]) & 0x3F
            place += 3
        else:
            high = (byte & 0x7) << 18 | (np.uint32(flat[place + 1]) & 0x3F) << 12
            points[count] = high | (np.uint32(flat[place + 2]) & 0x3F) << 6 | np.uint32(flat[place + 3]) & 0x3F
            place += 4
        count += 1
    while count < size:
        points[count] = 0
        count += 1
    return count


@njit(nogil=True, cache=True)
def codes_of(flat, begin, end, size, points, codes):  # type: ignore[no-untyped-def]
    """The shingle codes of one text in order, with repeats, into ``codes``; returns how many.

    ``points`` and ``codes`` are scratch of at least ``end - begin + size`` elements.
    """
    count = _points(flat, begin, end, size, points)
    step = STEP_EXACT if size <= 3 else STEP_HASH
    windows = count - size + 1
    for place in range(windows):
        code = np.uint64(points[place])
        for offset in range(1, size):
            code = code * step + np.uint64(points[place + offset])
        codes[place] = code
    return windows


@njit(nogil=True, cache=True)
def _hash64(code):  # type: ignore[no-untyped-def]
    code = (code ^ (code >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return (code ^ (code >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)


@njit(nogil=True, cache=True)
def hash32(code):  # type: ignore[no-untyped-def]
    """A 32-bit hash of a shingle: the upper half of MurmurHash3's 64-bit finalizer."""
    return np.uint32(_hash64(code) >> np.uint64(32))


@njit(nogil=True, cache=True)
def _premix(value):  # type: ignore[no-untyped-def]
    """MurmurHash3's 32-bit finalizer, which datasketch's ``affine32`` applies once before its permutations."""
    value = np.uint32((value ^ (value >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    value = np.uint32((value ^ (value >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(value ^ (value >> np.uint32(16)))


@njit(nogil=True, cache=True)
def _least(hashes, factors, offsets, row):  # type: ignore[no-untyped-def]
    """The least value of each permutation; four at a time, so that each hash is loaded once for them."""
    most = np.uint32(0xFFFFFFFF)
    fours = len(factors) // 4 * 4
    for first in range(0, fours, 4):
        factor0, factor1, factor2, factor3 = factors[first], factors[first + 1], factors[first + 2], factors[first + 3]
        offset0, offset1, offset2, offset3 = offsets[first], offsets[first + 1], offsets[first + 2], offsets[first + 3]
        least0 = least1 = least2 = least3 = most
        for place in range(len(hashes)):
            value = hashes[place]
            least0 = min(least0, np.uint32(np.uint32(value * factor0) + offset0))
            least1 = min(least1, np.uint32(np.uint32(value * factor1) + offset1))
            least2 = min(least2, np.uint32(np.uint32(value * factor2) + offset2))
            least3 = min(least3, np.uint32(np.uint32(value * factor3) + offset3))
        row[first], row[first + 1], row[first + 2], row[first + 3] = least0, least1, least2, least3
    for single in range(fours, len(factors)):
        least = most
        for place in range(len(hashes)):
            least = min(least, np.uint32(np.uint32(hashes[place] * factors[single]) + offsets[single]))
        row[single] = least


@njit(nogil=True, cache=True)
def sign(flat, starts, size, factors, offsets, signatures, digests):  # type: ignore[no-untyped-def]
    """MinHash signatures (documents x permutations, uint32) and 64-bit digests of texts in one array of bytes."""
    longest = 0
    for text in range(len(starts) - 1):
        longest = max(longest, starts[text + 1] - starts[text])
    points = np.empty(longest + size, np.uint32)
    codes = np.empty(longest + size, np.uint64)
    hashes = np.empty(longest + size, np.uint32)
    recent = np.empty(RECENT, np.uint32)
    for text in range(len(starts) - 1):
        count = codes_of(flat, starts[text], starts[text + 1], size, points, codes)
        digest = np.uint64(count)
        recent[:] = 0
        kept = 0
        for place in range(count):
            full = _hash64(codes[place])
            digest += full * np.uint64(2 * place + 1)
            value = _premix(np.uint32(full >> np.uint64(32)))
            slot = value & np.uint32(RECENT - 1)
            fresh = (recent[slot] != value) | (value == 0)
            recent[slot] = value
            hashes[kept] = value
            kept += fresh  # no branch: which shingle comes again cannot be predicted
        digests[text] = digest
        _least(hashes[:kept], factors, offsets, signatures[text])


@njit(nogil=True, cache=True)
def band_keys(signatures, first, rows, out):  # type: ignore[no-untyped-def]
    """One 64-bit key for each text from ``rows`` values of its signature. Unequal bands may share a key by accident
    (chance 2^-64); verification takes care of it."""
    for text in range(len(signatures)):
        key = np.uint64(0)
        for place in range(first, first + rows):
            key = (key ^ np.uint64(signatures[text, place])) * STEP_HASH
            key ^= key >> np.uint64(32)
        out[text] = key


@njit(nogil=True, cache=True)
def same_bytes(flat, starts, left, right):  # type: ignore[no-untyped-def]
    """Whether two texts are equal, for arrays of pairs."""
    equal = np.empty(len(left), np.bool_)
    for pair in range(len(left)):
        one, other = starts[left[pair]], starts[right[pair]]
        length = starts[left[pair] + 1] - one
        equal[pair] = starts[right[pair] + 1] - other == length
        place = 0
        while equal[pair] and place < length:
            equal[pair] = flat[one + place] == flat[other + place]
            place += 1
    return equal


@njit(nogil=True, cache=True)
def sketch(signatures, first, count, out):  # type: ignore[no-untyped-def]
    """The lowest bits of up to 64 values of each signature, as one number: two texts agree in a bit with probability
    (1 + J) / 2."""
    for text in range(len(signatures)):
        bits = np.uint64(0)
        for place in range(first, first + count):
            bits = bits << np.uint64(1) | np.uint64(signatures[text, place] & np.uint32(1))
        out[text] = bits


@intrinsic
def _ones(typing, value):  # type: ignore[no-untyped-def]
    """The number of bits that are set."""
    return value(value), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@njit(nogil=True, cache=True)
def _find(table, stamps, stamp, mask, code):  # type: ignore[no-untyped-def]
    """The code's slot in a hash table, or the free one where it belongs. Slots with another stamp are free."""
    slot = np.uint64(hash32(code)) & mask
    while stamps[slot] == stamp and table[slot] != code:
        slot = (slot + np.uint64(1)) & mask
    return slot


@njit(nogil=True, cache=True)
def match(  # type: ignore[no-untyped-def]
    batch, fresh_from, flat, starts, size, signatures, limits, threshold, buckets, rank, begins, filled, members,
    low, low_of_member, high, seen, found, similarity, append,
):  # fmt: skip
    """Look for a kept near-duplicate of each text of ``batch``, visited in this order.

    Candidates are the kept texts in its buckets whose rank is below ``fresh_from`` if ``append`` is 0, and at or above
    it if 1: then texts without a match are kept, that is, added to their buckets, so that later ones of the batch see
    them. The match is the candidate of lowest rank whose exact Jaccard similarity is at least ``threshold``.

    Args:
        limits: in how many bits of the low sketch, bits of both and places of the signature a candidate must agree to
            be verified. Unrelated texts share buckets by the thousand; nearly all end at the first.
        buckets: bucket of text and band, -1 where it would be alone; shape (bands, texts).
        begins, filled, members: bucket ``b`` holds the kept texts ``members[begins[b]:begins[b] + filled[b]]``, in the
            order of their ranks; ``low_of_member`` their low sketches.
        seen: scratch of length texts, any value below the batch's ranks.
        found, similarity: results by text: the matching text or -1.

    Returns:
        candidate pairs verified exactly.
    """
    longest = 0
    for text in batch:
        longest = max(longest, starts[text + 1] - starts[text])
    table, stamps, mask = _table(longest + size)
    others, other_stamps, other_mask = _table(longest + size)
    marks = np.zeros(len(stamps), np.int32)
    stamp = mark = np.int32(0)
    points = np.empty(longest + size, np.uint32)
    codes = np.empty(longest + size, np.uint64)
    candidates = np.empty(64, np.int64)
    verified = 0
    for text in batch:
        if append == 1 and found[text] >= 0:
            continue
        many = 0
        for band in range(len(buckets)):
            bucket = buckets[band, text]
            if bucket < 0:
                continue
            first, node = begins[bucket], begins[bucket] + filled[bucket]
            while node > first:
                node -= 1
                if append == 1 and rank[members[node]] < fresh_from:
                    break
                agree = 64 - _ones(low[text] ^ low_of_member[node])  # type: ignore[call-arg]
                if agree < limits[0]:
                    continue
                other = members[node]
                if seen[other] == rank[text]:
                    continue
                seen[other] = rank[text]
                if agree + 64 - _ones(high[text] ^ high[other]) < limits[1]:
                    continue
                equal = 0
                for place in range(signatures.shape[1]):
                    equal += signatures[text, place] == signatures[other, place]
                if equal < limits[2]:
                    continue
                if many == len(candidates):
                    more = np.empty(2 * many, np.int64)
                    more[:many] = candidates
                    candidates = more
                candidates[many] = rank[other] << 32 | other
                many += 1
        if many > 0:
            stamp += np.int32(1)
            own = 0
            count = codes_of(flat, starts[text], starts[text + 1], size, points, codes)
            for place in range(count):
                slot = _find(table, stamps, stamp, mask, codes[place])
                if stamps[slot] != stamp:
                    stamps[slot] = stamp
                    table[slot] = codes[place]
                    own += 1
        for packed in np.sort(candidates[:many]):
            other = packed & 0xFFFFFFFF
            length = starts[other + 1] - starts[other]
            if length + size > len(points):
                points = np.empty(length + size, np.uint32)
                codes = np.empty(length + size, np.uint64)
                others, other_stamps, other_mask = _table(length + size)
            verified += 1
            mark += np.int32(1)
            shared = alone = 0
            count = codes_of(flat, starts[other], starts[other + 1], size, points, codes)
            for place in range(count):
                slot = _find(table, stamps, stamp, mask, codes[place])
                if stamps[slot] == stamp:
                    shared += marks[slot] != mark
                    marks[slot] = mark
                    continue
                slot = _find(others, other_stamps, mark, other_mask, codes[place])
                alone += other_stamps[slot] != mark
                other_stamps[slot] = mark
                others[slot] = codes[place]
            alike = shared / (own + alone)
            if alike >= threshold:
                found[text] = other
                similarity[text] = alike
                break
        if append == 1 and found[text] < 0:
            for band in range(len(buckets)):
                bucket = buckets[band, text]
                if bucket >= 0:
                    node = begins[bucket] + filled[bucket]
                    members[node] = text
                    low_of_member[node] = low[text]
                    filled[bucket] += 1
    return verified


@njit(nogil=True, cache=True)
def _table(least):  # type: ignore[no-untyped-def]
    """An empty hash table for ``least`` codes, the stamps of its slots and its mask."""
    capacity = 16
    while capacity < 2 * least:
        capacity *= 2
    return np.empty(capacity, np.uint64), np.zeros(capacity, np.int32), np.uint64(capacity - 1)
