/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Marks which blocks of followed disks were changed: at completion, and in other maps at submission; and knows of every
 * change in flight to which generation of submission map it belongs. mobility_agent/tracking/kernel_tracker.py is its other
 * half: the layouts here are those of its structures.
 *
 * - A mark in a map that is in use is never taken back here, and user space takes none back there: it swaps the map.
 * - A change counts as finished only after its blocks were marked as completed.
 * - Whatever cannot be marked exactly is counted under a name, and user space draws the conclusion. */
#include "kernel_types.h"

char terms[] SEC("license") = "Dual BSD/GPL";

#define DISKS_MAX 64
#define CHANGES_IN_FLIGHT_MAX 32768
#define CHUNK_BLOCKS 32768
#define LOOPS_MAX (1 << 20)
#define BIOS_PER_REQUEST_MAX 4096

/* One disk that is followed, by the number of its whole device. */
struct followed {
	u32 slot;
	u32 block_shift; /* sectors per block, as a power of two */
	u64 blocks;
};

/* Of one disk, over all processors. */
struct counters {
	u64 submitted_sectors;
	u64 completed_sectors[2]; /* as each of the two completion programs saw them */
	u64 pass_through;	  /* changes whose place is not known (SG_IO, NVMe commands) */
	u64 beyond_end;		  /* changes behind the end of the maps */
	u64 untracked;		  /* submissions for which there was no room among the changes in flight */
	u64 foreign;		  /* completions of what was not seen being submitted */
	u64 never_completed;	  /* submissions whose bio came again without having been seen completing */
	u64 failed;
	u64 discards;
	u64 zeroings;
};

/* How many changes that were marked in a submission map of one parity began and ended. */
struct flight {
	u64 begun;
	u64 ended;
};

struct change {
	u64 sector;
	u32 bytes;
	u32 flight;
};

/* An inner map: chunk 0 says of which parity it is, chunk n + 1 holds the bits of blocks [n, n + 1) * CHUNK_BLOCKS. */
struct chunk {
	u64 words[CHUNK_BLOCKS / 64];
};

struct {
	MAP_UINT(type, BPF_MAP_TYPE_HASH);
	MAP_UINT(max_entries, DISKS_MAX);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, struct followed);
} followed_disks SEC(".maps");

struct {
	MAP_UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	MAP_UINT(max_entries, DISKS_MAX);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, struct counters);
} disk_counters SEC(".maps");

struct {
	MAP_UINT(type, BPF_MAP_TYPE_ARRAY);
	MAP_UINT(max_entries, 2 * DISKS_MAX);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, struct flight);
} flights SEC(".maps");

struct {
	MAP_UINT(type, BPF_MAP_TYPE_HASH);
	MAP_UINT(max_entries, CHANGES_IN_FLIGHT_MAX);
	MAP_TYPE(key, u64); /* the bio */
	MAP_TYPE(value, struct change);
} in_flight SEC(".maps");

/* By sizes, not types: kernels up to 6.1 refuse inner maps that differ from this one in their type information, and those
 * that user space makes have none. */
struct marks {
	MAP_UINT(type, BPF_MAP_TYPE_ARRAY);
	MAP_UINT(max_entries, 1);
	MAP_UINT(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	MAP_UINT(key_size, 4);
	MAP_UINT(value_size, sizeof(struct chunk));
};

/* Of each slot: what changed, marked at completion; the same, marked at submission; what certainly or perhaps changed
 * otherwise than by a discard, marked at both times. */
#define AT_COMPLETION 0
#define AT_SUBMISSION 1
#define WRITTEN 2
#define MARKS_PER_DISK 3
struct {
	MAP_UINT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_UINT(max_entries, MARKS_PER_DISK * DISKS_MAX);
	MAP_UINT(key_size, 4);
	typeof(struct marks) *values[];
} marks_in_use SEC(".maps");

#define COUNT(counter, amount) __sync_fetch_and_add(&(counter), (amount))

INLINE int is_change(u32 operation)
{
	return operation & 1; /* the kernel's own rule: odd operations take data to the device, or change what it holds */
}

INLINE int is_discard(u32 operation)
{
	return operation == OPERATION(REQ_OP_DISCARD) || operation == OPERATION(REQ_OP_SECURE_ERASE);
}

struct marking {
	void *marks;
	u64 block, end;
	u32 failed;
};

/* Marks the blocks of one word. */
static long mark_word(u32 index, struct marking *marking)
{
	u64 block = marking->block, left, mask;
	u32 key, word, bit, count;
	struct chunk *chunk;

	if (block >= marking->end)
		return 1;
	key = block / CHUNK_BLOCKS + 1;
	chunk = bpf_map_lookup_elem(marking->marks, &key);
	if (!chunk) {
		marking->failed = 1;
		return 1;
	}
	word = (block >> 6) & (CHUNK_BLOCKS / 64 - 1);
	bit = block & 63;
	left = marking->end - block;
	count = 64 - bit;
	if (left < count)
		count = left;
	mask = (count >= 64 ? ~0ULL : (1ULL << count) - 1) << bit;
	/* An atomic only where a bit is missing: nobody takes a bit back from a map in use. */
	if ((*(volatile u64 *)&chunk->words[word] & mask) != mask)
		__sync_fetch_and_or(&chunk->words[word], mask);
	marking->block = block + count;
	return 0;
}

INLINE void mark(struct followed *disk, u32 kind, u64 sector, u32 bytes, struct counters *counters)
{
	u32 slot = MARKS_PER_DISK * disk->slot + kind;
	struct marking marking = {};

	if (!bytes)
		return;
	marking.block = sector >> disk->block_shift;
	marking.end = ((sector + ((bytes + 511) >> 9) - 1) >> disk->block_shift) + 1;
	marking.marks = bpf_map_lookup_elem(&marks_in_use, &slot);
	if (!marking.marks || marking.end > disk->blocks) {
		COUNT(counters->beyond_end, 1);
		if (!marking.marks)
			return;
		marking.end = disk->blocks;
	}
	mark_word(0, &marking);
	if (marking.block < marking.end && !marking.failed)
		bpf_loop(LOOPS_MAX, mark_word, &marking, 0);
	if (marking.failed || marking.block < marking.end)
		COUNT(counters->beyond_end, 1);
}

/* A block of which a discard covers only a part is one that was written: the rest of it counts. */
INLINE void mark_change(struct followed *disk, u32 kind, u64 sector, u32 bytes, int discards, struct counters *counters)
{
	u64 end = sector + ((bytes + 511) >> 9), within = (1ULL << disk->block_shift) - 1;

	mark(disk, kind, sector, bytes, counters);
	if (!discards) {
		mark(disk, WRITTEN, sector, bytes, counters);
		return;
	}
	if (sector & within)
		mark(disk, WRITTEN, sector, 512, counters);
	if (end & within)
		mark(disk, WRITTEN, end - 1, 512, counters);
}

INLINE void end_flight(u32 number)
{
	struct flight *flight = bpf_map_lookup_elem(&flights, &number);

	if (flight)
		COUNT(flight->ended, 1);
}

INLINE int begin_flight(u64 bio, const struct change *change, struct counters *counters)
{
	struct flight *flight = bpf_map_lookup_elem(&flights, &change->flight);
	struct change *stale = bpf_map_lookup_elem(&in_flight, &bio);

	if (!flight)
		return 0;
	if (stale) {
		COUNT(counters->never_completed, 1);
		end_flight(stale->flight);
	}
	COUNT(flight->begun, 1);
	if (bpf_map_update_elem(&in_flight, &bio, change, 0)) {
		COUNT(counters->untracked, 1);
		COUNT(flight->ended, 1);
	}
	return 0;
}

/* Returns whether it was in flight as far as anybody knew. */
INLINE int finish(u64 bio)
{
	struct change *change = bpf_map_lookup_elem(&in_flight, &bio);
	u32 number;

	if (!change)
		return 0;
	number = change->flight;
	if (!bpf_map_delete_elem(&in_flight, &bio))
		end_flight(number);
	return 1;
}

INLINE struct followed *follow(u32 device, struct counters **counters)
{
	struct followed *disk = bpf_map_lookup_elem(&followed_disks, &device);

	if (!disk)
		return 0;
	*counters = bpf_map_lookup_elem(&disk_counters, &disk->slot);
	return *counters ? disk : 0;
}

SEC("tp_btf/block_bio_queue") int mark_submitted(u64 *context)
{
	struct bio *bio = (struct bio *)context[0];
	u32 operation = bio->bi_opf & 0xff, slot, header = 0;
	struct change change = {};
	struct counters *counters;
	struct followed *disk;
	struct chunk *chunk;
	void *marks;

	if (!is_change(operation))
		return 0;
	disk = follow(bio->bi_bdev->bd_disk->part0->bd_dev, &counters);
	if (!disk)
		return 0;
	change.sector = bio->bi_iter.bi_sector;
	change.bytes = bio->bi_iter.bi_size;
	if (!change.bytes)
		return 0;
	COUNT(counters->submitted_sectors, change.bytes >> 9);
	if (is_discard(operation))
		COUNT(counters->discards, 1);
	if (operation == OPERATION(REQ_OP_WRITE_ZEROES))
		COUNT(counters->zeroings, 1);
	slot = MARKS_PER_DISK * disk->slot + AT_SUBMISSION;
	marks = bpf_map_lookup_elem(&marks_in_use, &slot);
	if (!marks)
		return 0;
	chunk = bpf_map_lookup_elem(marks, &header);
	if (!chunk)
		return 0;
	change.flight = 2 * disk->slot + (chunk->words[0] & 1);
	begin_flight((u64)bio, &change, counters);
	mark_change(disk, AT_SUBMISSION, change.sector, change.bytes, is_discard(operation), counters);
	return 0;
}

/* A part of a bio goes its own way: it belongs to the generation that the whole belongs to. */
SEC("tp_btf/block_split") int follow_split(u64 *context)
{
	struct bio *part = (struct bio *)context[0];
	u64 whole = (u64)part->bi_private;
	struct change change, *known;
	struct counters *counters;
	struct followed *disk;
	u32 bytes;

	if (!is_change(part->bi_opf & 0xff))
		return 0;
	disk = follow(part->bi_bdev->bd_disk->part0->bd_dev, &counters);
	if (!disk)
		return 0;
	known = bpf_map_lookup_elem(&in_flight, &whole);
	if (!known)
		return 0;
	bytes = part->bi_iter.bi_size;
	change.sector = part->bi_iter.bi_sector;
	change.bytes = bytes;
	change.flight = known->flight;
	if (bytes < known->bytes) {
		known->sector = change.sector + (bytes >> 9);
		known->bytes -= bytes;
	}
	begin_flight((u64)part, &change, counters);
	return 0;
}

struct walk {
	u64 bio;
	u64 bytes;
	struct followed *disk;
	struct counters *counters;
	u32 is_discard;
	u32 is_done; /* it did not fail: a discard that failed left what was there */
	u32 counts;
};

/* One bio of a request that completes: its own place if ranges were merged, and the end of its flight if all of it is done. */
static long walk_bio(u32 index, struct walk *walk)
{
	struct bio *bio = (struct bio *)walk->bio;
	struct bio *next = 0;
	u64 sector = 0;
	u32 bytes = 0;

	if (!bio || !walk->bytes)
		return 1;
	READ_FIELD(bytes, bio, bi_iter.bi_size);
	READ_FIELD(sector, bio, bi_iter.bi_sector);
	READ_FIELD(next, bio, bi_next);
	if (walk->is_discard)
		mark_change(walk->disk, AT_COMPLETION, sector, bytes, walk->is_done, walk->counters);
	if (bytes > walk->bytes)
		return 1; /* the request completes in parts, and this one ends within the bio */
	if (!finish((u64)bio) && walk->counts)
		COUNT(walk->counters->foreign, 1);
	walk->bytes -= bytes;
	walk->bio = (u64)next;
	return 0;
}

INLINE int request_completed(u64 *context, u32 copy)
{
	struct request *request = (struct request *)context[0];
	u32 bytes = context[2], operation = request->cmd_flags & 0xff;
	struct walk walk = {};
	struct gendisk *gendisk;

	if (!is_change(operation))
		return 0;
	gendisk = request->q->disk;
	if (!gendisk)
		return 0;
	walk.disk = follow(gendisk->part0->bd_dev, &walk.counters);
	if (!walk.disk)
		return 0;
	if (operation == OPERATION(REQ_OP_DRV_OUT)) {
		COUNT(walk.counters->pass_through, 1);
		return 0;
	}
	if ((u8)context[1] && !copy)
		COUNT(walk.counters->failed, 1); /* marked all the same: a write that failed may have changed the medium */
	COUNT(walk.counters->completed_sectors[copy], bytes >> 9);
	walk.is_discard = is_discard(operation);
	walk.is_done = !(u8)context[1];
	if (!walk.is_discard)
		mark_change(walk.disk, AT_COMPLETION, request->__sector, bytes, 0, walk.counters);
	walk.bio = (u64)request->bio;
	walk.bytes = bytes;
	walk.counts = !copy;
	if (!walk_bio(0, &walk))
		bpf_loop(BIOS_PER_REQUEST_MAX, walk_bio, &walk, 0);
	return 0;
}

/* Only drivers that take bios come here, and bios that end before they got into a request. */
INLINE int bio_completed(u64 *context, u32 copy)
{
	struct bio *bio = (struct bio *)context[1];
	u64 key = (u64)bio, sector;
	struct counters *counters;
	struct followed *disk;
	struct change *change;
	u32 bytes, operation = bio->bi_opf & 0xff, status = bio->bi_status;

	if (!is_change(operation))
		return 0;
	disk = follow(bio->bi_bdev->bd_disk->part0->bd_dev, &counters);
	if (!disk)
		return 0;
	sector = bio->bi_iter.bi_sector;
	bytes = bio->bi_iter.bi_size;
	KEEP(sector);
	KEEP(bytes);
	change = bpf_map_lookup_elem(&in_flight, &key);
	if (change) { /* a driver may have moved the bio's own iterator meanwhile */
		sector = change->sector;
		bytes = change->bytes;
	}
	if (change || !copy) { /* whichever copy comes first counts for both */
		COUNT(counters->completed_sectors[0], bytes >> 9);
		COUNT(counters->completed_sectors[1], bytes >> 9);
		if (status)
			COUNT(counters->failed, 1);
	}
	mark_change(disk, AT_COMPLETION, sector, bytes, is_discard(operation) && !status, counters);
	if (!finish(key) && bytes && !copy)
		COUNT(counters->foreign, 1);
	return 0;
}

/* Each twice: an interrupt that comes while one of them runs is not seen by that one, but by the other. */
SEC("tp_btf/block_rq_complete") int mark_request(u64 *context)
{
	return request_completed(context, 0);
}

SEC("tp_btf/block_rq_complete") int mark_request_again(u64 *context)
{
	return request_completed(context, 1);
}

SEC("tp_btf/block_bio_complete") int mark_bio(u64 *context)
{
	return bio_completed(context, 0);
}

SEC("tp_btf/block_bio_complete") int mark_bio_again(u64 *context)
{
	return bio_completed(context, 1);
}
