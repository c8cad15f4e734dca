/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Marks which blocks of followed disks were changed: at completion, and in other maps at submission; and knows of every
 * change in flight to which generation of submission map it belongs. mobility_agent/tracking/kernel_tracker.py is its other
 * half: the layouts here are those of its structures.
 *
 * - A mark in a map that is in use is never taken back here, and user space takes none back there: it swaps the map.
 * - A change counts as finished only after its blocks were marked as completed.
 * - Whatever cannot be marked exactly is counted under a name, and user space draws the conclusion.
 *
 * Every write of a followed disk pays for what stands here: no hash table, no lock, no line of memory that other
 * processors write to where it can be helped (docs/performance.md). */
#include "kernel_types.h"

char terms[] SEC("license") = "Dual BSD/GPL";

#define DISKS_MAX 64
#define PLACES 1024
#define PLACES_TRIED 4
#define BUCKETS 8192
#define BUCKET_CHANGES 8
#define CHUNK_BLOCKS 32768
#define LOOPS_MAX (1 << 20)
#define BIOS_PER_REQUEST_MAX 4096
#define GOLDEN_RATIO 0x9E3779B9U

/* One disk that is followed; it stands at one of the PLACES_TRIED places from where the number of its whole device leads. */
struct followed {
	u32 device; /* 0: there is none at this place */
	u32 slot;
	u32 block_shift; /* sectors per block, as a power of two */
	u32 area_shift;	 /* and per area, which is one block or several */
	u64 blocks;
	u64 areas;
};

/* Of one disk, per processor. */
struct counters {
	u64 submitted_sectors;
	u64 completed_sectors;
	u64 begun[2]; /* changes that were marked in a submission map of one parity, and how many of them ended */
	u64 ended[2];
	u64 pass_through;    /* changes whose place is not known (SG_IO, NVMe commands) */
	u64 beyond_end;	     /* changes behind the end of the maps */
	u64 untracked;	     /* submissions for which there was no room among the changes in flight */
	u64 foreign;	     /* completions of what was not seen being submitted */
	u64 never_completed; /* flights whose bio came again, for whichever disk, without having been seen completing */
	u64 failed;
	u64 discards;
	u64 zeroings;
};

struct change {
	u64 sector;
	u32 bytes;
	u32 flight; /* twice the slot, and the parity of the submission map */
};

/* Changes in flight whose bios' addresses lead here: what of an address tells bios apart, the slot of its disk above that
 * and the parity of its generation below. 0 is a free place. All that the end of a request needs of its bios lies in one
 * line of memory. */
#define SLOT_SHIFT 58 /* all addresses in the kernel agree from there on */
#define ADDRESS ((1ULL << SLOT_SHIFT) - 2)
struct bucket {
	u64 bios[BUCKET_CHANGES];
	struct change changes[BUCKET_CHANGES];
};

/* An inner map: chunk 0 says of which parity it is, chunk n + 1 holds the bits of blocks [n, n + 1) * CHUNK_BLOCKS, or
 * of areas. */
struct chunk {
	u64 words[CHUNK_BLOCKS / 64];
};

struct {
	MAP_UINT(type, BPF_MAP_TYPE_ARRAY);
	MAP_UINT(max_entries, PLACES);
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
	MAP_UINT(max_entries, BUCKETS);
	MAP_UINT(map_flags, BPF_F_MMAPABLE);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, struct bucket);
} in_flight SEC(".maps");

/* Which program it is that is running: none of them is run within itself. */
#define SUBMISSION 0
#define SPLIT 1
#define REQUEST 2 /* and the second one */
#define BIO 4	  /* and the second one */
#define PROGRAMS 6

/* Of one processor. */
struct at_work {
	u64 dealt_with; /* what the first of two completion programs has just dealt with, for the second; 0 otherwise */
	u64 addresses[PROGRAMS];
};

struct {
	MAP_UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, struct at_work);
} at_work_now SEC(".maps");

/* By sizes, not types: kernels up to 6.1 refuse inner maps that differ from this one in their type information, and those
 * that user space makes have none. */
struct marks {
	MAP_UINT(type, BPF_MAP_TYPE_ARRAY);
	MAP_UINT(max_entries, 1);
	MAP_UINT(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	MAP_UINT(key_size, 4);
	MAP_UINT(value_size, sizeof(struct chunk));
};

/* Of each slot: the blocks that were changed otherwise than by a discard, marked at completion; the areas with such
 * blocks, marked at submission; the areas that were discarded as a whole, marked at both times. */
#define AT_COMPLETION 0
#define AT_SUBMISSION 1
#define DISCARDED 2
#define MARKS_PER_DISK 3
struct {
	MAP_UINT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_UINT(max_entries, MARKS_PER_DISK * DISKS_MAX);
	MAP_UINT(key_size, 4);
	typeof(struct marks) *values[];
} marks_in_use SEC(".maps");

#define COUNT(counter, amount) __sync_fetch_and_add(&(counter), (amount))

INLINE struct at_work *at_work(void)
{
	u32 place = 0;

	return bpf_map_lookup_elem(&at_work_now, &place);
}

/* An address as a number: the verifier lets nobody calculate with addresses, and takes what comes from a map for none. */
INLINE u64 number_of(void *address, struct at_work *work, u32 program)
{
	*(volatile u64 *)&work->addresses[program] = (u64)address;
	return *(volatile u64 *)&work->addresses[program];
}

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
};

/* Marks the blocks, or areas, of one word. */
static long mark_next_word(u32 index, struct marking *marking)
{
	u64 block = marking->block, left, mask;
	u32 key, word, bit, count;
	struct chunk *chunk;

	if (block >= marking->end)
		return 1;
	key = block / CHUNK_BLOCKS + 1;
	chunk = bpf_map_lookup_elem(marking->marks, &key);
	if (!chunk)
		return 1;
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

INLINE void *marks_of(u32 slot, u32 kind)
{
	u32 place = MARKS_PER_DISK * slot + kind;

	return bpf_map_lookup_elem(&marks_in_use, &place);
}

GLOBAL int count_beyond_end(u32 slot)
{
	struct counters *counters = bpf_map_lookup_elem(&disk_counters, &slot);

	if (counters)
		COUNT(counters->beyond_end, 1);
	return 0;
}

/* Marks the blocks, or areas, of a change of the disk at this place of followed_disks. */
GLOBAL int mark(u32 place, u32 kind, u64 sector, u32 bytes)
{
	struct followed *disk = bpf_map_lookup_elem(&followed_disks, &place);
	struct marking marking = {};
	u64 end, last;
	u32 shift;

	if (!disk || !bytes)
		return 0;
	shift = kind == AT_COMPLETION ? disk->block_shift : disk->area_shift;
	last = kind == AT_COMPLETION ? disk->blocks : disk->areas;
	marking.block = sector >> shift;
	end = ((sector + ((bytes + 511) >> 9) - 1) >> shift) + 1;
	marking.end = end > last ? last : end;
	marking.marks = marks_of(disk->slot, kind);
	if (!marking.marks) {
		count_beyond_end(disk->slot);
		return 0;
	}
	if (!mark_next_word(0, &marking) && marking.block < marking.end)
		bpf_loop(LOOPS_MAX, mark_next_word, &marking, 0);
	if (marking.block < end)
		count_beyond_end(disk->slot);
	return 0;
}

/* An area of which a discard covers only a part is one that was written: the rest of it counts. */
GLOBAL int mark_discard(u32 place, u32 kind_of_written, u64 sector, u32 bytes)
{
	struct followed *disk = bpf_map_lookup_elem(&followed_disks, &place);
	u64 end = sector + ((bytes + 511) >> 9), within, first, last;

	if (!disk)
		return 0;
	within = (1ULL << disk->area_shift) - 1;
	first = (sector + within) & ~within;
	last = end & ~within;
	if (first >= last)
		return mark(place, kind_of_written, sector, bytes);
	mark(place, DISCARDED, first, (last - first) << 9);
	if (sector < first)
		mark(place, kind_of_written, sector, (first - sector) << 9);
	if (last < end)
		mark(place, kind_of_written, last, (end - last) << 9);
	return 0;
}

/* Where the bio is among the changes of the bucket, or BUCKET_CHANGES. */
GLOBAL u32 find(struct bucket *bucket, u64 bio)
{
	u32 index;

	if (!bucket)
		return BUCKET_CHANGES;
#pragma unroll
	for (index = 0; index < BUCKET_CHANGES; index++)
		if ((bucket->bios[index] & ADDRESS) == (bio & ADDRESS))
			return index;
	return BUCKET_CHANGES;
}

/* Gives the bio of this flight a place in the bucket, which does not hold it: where, or BUCKET_CHANGES if it is full. */
GLOBAL u32 take_place(struct bucket *bucket, u64 flying)
{
	u32 index;

	if (!bucket)
		return BUCKET_CHANGES;
#pragma unroll
	for (index = 0; index < BUCKET_CHANGES; index++)
		if (!bucket->bios[index] && !__sync_val_compare_and_swap(&bucket->bios[index], 0, flying))
			return index;
	return BUCKET_CHANGES;
}

INLINE struct bucket *bucket_of(u64 bio)
{
	u32 place = ((u32)(bio >> 6) * GOLDEN_RATIO) >> 19; /* 32 bits less those of BUCKETS */

	return bpf_map_lookup_elem(&in_flight, &place);
}

/* Asks for the line of memory that the change in flight is in, while another is still on its way: what has to be atomic
 * waits for all lines that were asked for. */
INLINE void approach(u64 bio)
{
	struct bucket *bucket = bucket_of(bio);

	if (bucket)
		*(volatile u64 *)&bucket->bios[0];
}

/* A bio that came again ended its flight unseen, perhaps that of another disk, which is told. */
GLOBAL int end_stale_flight(u64 flying)
{
	u32 slot = flying >> SLOT_SHIFT;
	struct counters *counters = bpf_map_lookup_elem(&disk_counters, &slot);

	if (counters) {
		/* In this order: whoever finds that it has ended finds how. */
		COUNT(counters->never_completed, 1);
		COUNT(counters->ended[flying & 1], 1);
	}
	return 0;
}

INLINE void begin_flight(u64 bio, u64 sector, u32 bytes, u32 flight, struct counters *counters)
{
	u64 flying = (bio & ADDRESS) | (u64)(flight >> 1) << SLOT_SHIFT | (flight & 1);
	struct bucket *bucket = bucket_of(bio);
	struct change *change;
	u32 index;

	if (!bucket)
		return;
	index = find(bucket, bio);
	if (index < BUCKET_CHANGES) {
		end_stale_flight(bucket->bios[index]);
		*(volatile u64 *)&bucket->bios[index] = flying;
	} else {
		index = take_place(bucket, flying);
	}
	if (index >= BUCKET_CHANGES) {
		COUNT(counters->untracked, 1);
		return;
	}
	change = &bucket->changes[index];
	change->sector = sector;
	change->bytes = bytes;
	change->flight = flight;
	COUNT(counters->begun[flight & 1], 1);
}

/* Returns whether it was in flight as far as anybody knew, and of this disk. */
INLINE int finish(u64 bio, u32 slot, struct counters *counters)
{
	struct bucket *bucket = bucket_of(bio);
	u64 flying;
	u32 index;

	if (!bucket)
		return 0;
	index = find(bucket, bio);
	if (index >= BUCKET_CHANGES)
		return 0;
	flying = bucket->bios[index];
	*(volatile u64 *)&bucket->bios[index] = 0;
	if (flying >> SLOT_SHIFT != slot) {
		end_stale_flight(flying);
		return 0;
	}
	COUNT(counters->ended[flying & 1], 1);
	return 1;
}

/* Where the disk stands of the device with this number; PLACES if it is not followed. */
GLOBAL u32 find_disk(u32 device)
{
	u32 first = (device * GOLDEN_RATIO) >> 22, place, tried; /* 32 bits less those of PLACES */
	struct followed *disk;

#pragma unroll
	for (tried = 0; tried < PLACES_TRIED; tried++) {
		place = (first + tried) & (PLACES - 1);
		disk = bpf_map_lookup_elem(&followed_disks, &place);
		if (disk && disk->device == device)
			return place;
	}
	return PLACES;
}

/* Its place, and the counters of its disk; these are missing where it is not followed. */
INLINE u32 follow(u32 device, u32 *slot, struct counters **counters)
{
	u32 place = find_disk(device);
	struct followed *disk = bpf_map_lookup_elem(&followed_disks, &place);

	*counters = 0;
	if (disk) {
		*slot = disk->slot;
		*counters = bpf_map_lookup_elem(&disk_counters, slot);
	}
	return place;
}

SEC("tp_btf/block_bio_queue") int mark_submitted(u64 *context)
{
	struct bio *bio = (struct bio *)context[0];
	u32 operation = bio->bi_opf & 0xff, header = 0, place, slot, bytes;
	struct at_work *work = at_work();
	struct counters *counters;
	struct chunk *chunk;
	u64 sector, number;
	void *marks;

	if (!is_change(operation))
		return 0;
	place = follow(bio->bi_bdev->bd_disk->part0->bd_dev, &slot, &counters);
	if (!counters || !work)
		return 0;
	sector = bio->bi_iter.bi_sector;
	bytes = bio->bi_iter.bi_size;
	if (!bytes)
		return 0;
	counters->submitted_sectors += bytes >> 9; /* nobody else does, and this program is not run within itself */
	marks = marks_of(slot, AT_SUBMISSION);
	if (!marks)
		return 0;
	chunk = bpf_map_lookup_elem(marks, &header);
	if (!chunk)
		return 0;
	number = number_of(bio, work, SUBMISSION);
	approach(number);
	if (is_discard(operation)) {
		COUNT(counters->discards, 1);
		mark_discard(place, AT_SUBMISSION, sector, bytes);
	} else {
		if (operation == OPERATION(REQ_OP_WRITE_ZEROES))
			COUNT(counters->zeroings, 1);
		mark(place, AT_SUBMISSION, sector, bytes);
	}
	begin_flight(number, sector, bytes, 2 * slot + (chunk->words[0] & 1), counters);
	return 0;
}

/* A part of a bio goes its own way: it belongs to the generation that the whole belongs to. */
SEC("tp_btf/block_split") int follow_split(u64 *context)
{
	struct bio *part = (struct bio *)context[0];
	u64 whole, sector;
	struct at_work *work = at_work();
	u32 bytes, flight, index, slot;
	struct counters *counters;
	struct bucket *bucket;
	struct change *known;

	if (!is_change(part->bi_opf & 0xff))
		return 0;
	follow(part->bi_bdev->bd_disk->part0->bd_dev, &slot, &counters);
	if (!counters || !work)
		return 0;
	whole = number_of(part->bi_private, work, SPLIT);
	bucket = bucket_of(whole);
	if (!bucket)
		return 0;
	index = find(bucket, whole);
	if (index >= BUCKET_CHANGES || bucket->bios[index] >> SLOT_SHIFT != slot)
		return 0;
	known = &bucket->changes[index];
	bytes = part->bi_iter.bi_size;
	sector = part->bi_iter.bi_sector;
	flight = known->flight;
	if (bytes < known->bytes) {
		known->sector = sector + (bytes >> 9);
		known->bytes -= bytes;
	}
	begin_flight(number_of(part, work, SPLIT), sector, bytes, flight, counters);
	return 0;
}

struct walk {
	u64 bio;
	u64 bytes;
	u64 finished_sectors;
	struct counters *counters;
	u32 place;
	u32 slot;
	u32 unknown;
	u32 is_discard;
	u32 is_done; /* it did not fail: a discard that failed left what was there */
};

/* One bio of a request that completes: its own place if ranges were merged, and the end of its flight if all of it is done. */
INLINE long finish_bio(struct walk *walk, u64 sector, u32 bytes, u64 next)
{
	if (walk->is_discard) {
		if (walk->is_done)
			mark_discard(walk->place, AT_COMPLETION, sector, bytes);
		else
			mark(walk->place, AT_COMPLETION, sector, bytes);
	}
	if (bytes > walk->bytes)
		return 1; /* the request completes in parts, and this one ends within the bio */
	if (finish(walk->bio, walk->slot, walk->counters))
		walk->finished_sectors += bytes >> 9;
	else
		walk->unknown++;
	walk->bytes -= bytes;
	walk->bio = next;
	return 0;
}

static long finish_next_bio(u32 index, struct walk *walk)
{
	struct bio *bio = (struct bio *)walk->bio;
	u64 sector = 0, next = 0;
	u32 bytes = 0;

	if (!bio || !walk->bytes)
		return 1;
	READ_FIELD(bytes, bio, bi_iter.bi_size);
	READ_FIELD(sector, bio, bi_iter.bi_sector);
	READ_FIELD(next, bio, bi_next);
	return finish_bio(walk, sector, bytes, next);
}

/* is_second: the first program was perhaps run for it as well; what that one finished is not counted again. */
INLINE void request_completed(struct request *request, u32 is_failed, u32 bytes, struct at_work *work, u32 is_second)
{
	u32 operation = request->cmd_flags & 0xff;
	struct walk walk = {};
	struct gendisk *gendisk;
	struct bio *bio;

	gendisk = request->q->disk;
	if (!gendisk)
		return;
	walk.place = follow(gendisk->part0->bd_dev, &walk.slot, &walk.counters);
	if (!walk.counters)
		return;
	if (operation == OPERATION(REQ_OP_DRV_OUT)) {
		COUNT(walk.counters->pass_through, 1);
		return;
	}
	if (is_failed)
		COUNT(walk.counters->failed, 1); /* marked all the same: a write that failed may have changed the medium */
	walk.is_discard = is_discard(operation);
	walk.is_done = !is_failed;
	walk.bytes = bytes;
	bio = request->bio;
	if (bio) {
		walk.bio = number_of(bio, work, REQUEST + is_second);
		approach(walk.bio);
	}
	if (!walk.is_discard)
		mark(walk.place, AT_COMPLETION, request->__sector, bytes);
	if (bio && bytes) {
		finish_bio(&walk, bio->bi_iter.bi_sector, bio->bi_iter.bi_size, bio->bi_next ? number_of(bio->bi_next, work, REQUEST + is_second) : 0);
		if (walk.bio && walk.bytes)
			bpf_loop(BIOS_PER_REQUEST_MAX, finish_next_bio, &walk, 0);
	}
	COUNT(walk.counters->completed_sectors, is_second ? walk.finished_sectors : bytes >> 9);
	if (walk.unknown && !is_second)
		COUNT(walk.counters->foreign, walk.unknown);
}

/* Only drivers that take bios come here, and bios that end before they got into a request. */
INLINE void bio_completed(struct bio *bio, struct at_work *work, u32 is_second)
{
	u64 key, sector;
	struct counters *counters;
	struct bucket *bucket;
	u32 bytes, index, place, slot, operation = bio->bi_opf & 0xff, status = bio->bi_status;

	place = follow(bio->bi_bdev->bd_disk->part0->bd_dev, &slot, &counters);
	if (!counters)
		return;
	key = number_of(bio, work, BIO + is_second);
	bucket = bucket_of(key);
	if (!bucket)
		return;
	sector = bio->bi_iter.bi_sector;
	bytes = bio->bi_iter.bi_size;
	KEEP(sector);
	KEEP(bytes);
	index = find(bucket, key);
	if (index < BUCKET_CHANGES && bucket->bios[index] >> SLOT_SHIFT != slot)
		index = BUCKET_CHANGES;
	if (index < BUCKET_CHANGES) { /* a driver may have moved the bio's own iterator meanwhile */
		sector = bucket->changes[index].sector;
		bytes = bucket->changes[index].bytes;
	}
	if (index < BUCKET_CHANGES || !is_second) {
		COUNT(counters->completed_sectors, bytes >> 9);
		if (status)
			COUNT(counters->failed, 1);
	}
	if (is_discard(operation) && !status)
		mark_discard(place, AT_COMPLETION, sector, bytes);
	else
		mark(place, AT_COMPLETION, sector, bytes);
	if (!finish(key, slot, counters) && bytes && !is_second)
		COUNT(counters->foreign, 1);
}

/* Each twice: an interrupt that comes while one of them runs is not seen by that one, but by the other. The first says
 * what it has dealt with, and the second does it if that is another. All programs of one event run on one processor,
 * and the second leaves nothing behind: what it finds is of this event, or of none. */
SEC("tp_btf/block_rq_complete") int mark_request(u64 *context)
{
	struct request *request = (struct request *)context[0];
	struct at_work *work = at_work();

	if (!work || !is_change(request->cmd_flags & 0xff))
		return 0;
	request_completed(request, (u8)context[1], context[2], work, 0);
	*(volatile u64 *)&work->dealt_with = (u64)request;
	return 0;
}

SEC("tp_btf/block_rq_complete") int mark_request_again(u64 *context)
{
	struct request *request = (struct request *)context[0];
	struct at_work *work = at_work();

	if (!work || !is_change(request->cmd_flags & 0xff))
		return 0;
	if (*(volatile u64 *)&work->dealt_with != (u64)request)
		request_completed(request, (u8)context[1], context[2], work, 1);
	*(volatile u64 *)&work->dealt_with = 0;
	return 0;
}

SEC("tp_btf/block_bio_complete") int mark_bio(u64 *context)
{
	struct bio *bio = (struct bio *)context[1];
	struct at_work *work = at_work();

	if (!work || !is_change(bio->bi_opf & 0xff))
		return 0;
	bio_completed(bio, work, 0);
	*(volatile u64 *)&work->dealt_with = (u64)bio;
	return 0;
}

SEC("tp_btf/block_bio_complete") int mark_bio_again(u64 *context)
{
	struct bio *bio = (struct bio *)context[1];
	struct at_work *work = at_work();

	if (!work || !is_change(bio->bi_opf & 0xff))
		return 0;
	if (*(volatile u64 *)&work->dealt_with != (u64)bio)
		bio_completed(bio, work, 1);
	*(volatile u64 *)&work->dealt_with = 0;
	return 0;
}
