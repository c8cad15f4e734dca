/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What of the kernel's types block_writes.bpf.c reads, and the few helpers it calls. Where a field lies and which number an
 * operation has is found out by the kernel when it loads the program, so nothing here has to match a version. */
#pragma once

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct gendisk {
	struct block_device *part0;
};
struct block_device {
	u32 bd_dev;
	struct gendisk *bd_disk;
};
struct request_queue {
	struct gendisk *disk;
};
struct bvec_iter {
	u64 bi_sector;
	u32 bi_size;
};
struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	u32 bi_opf;
	u8 bi_status;
	struct bvec_iter bi_iter;
	void *bi_private;
};
struct request {
	struct request_queue *q;
	u32 cmd_flags;
	u64 __sector;
	struct bio *bio;
};
#pragma clang attribute pop

enum req_op { /* since 6.0 */
	REQ_OP_DISCARD = 3,
	REQ_OP_SECURE_ERASE = 5,
	REQ_OP_WRITE_ZEROES = 9,
	REQ_OP_DRV_OUT = 35,
};
enum req_opf { /* before */
	REQ_OP_DISCARD___before = 3,
	REQ_OP_SECURE_ERASE___before = 5,
	REQ_OP_WRITE_ZEROES___before = 9,
	REQ_OP_DRV_OUT___before = 35,
};

/* The number that the running kernel gives to an operation. */
#define EXISTS 0
#define VALUE 1
#define ENUMERATOR(type, name, what) __builtin_preserve_enum_value(*(typeof(type) *)name, what)
#define OPERATION(name)                                                                                                  \
	(ENUMERATOR(enum req_op, name, EXISTS) ? ENUMERATOR(enum req_op, name, VALUE)                                    \
					       : ENUMERATOR(enum req_opf, name##___before, VALUE))

/* Keeps the compiler from making one load of two that the verifier wants apart. */
#define KEEP(variable) asm volatile("" : "+r"(variable))

#define SEC(name) __attribute__((section(name), used))
/* Verified by itself, once: what it returns is any number to its callers, and not as many cases as it has exits. */
#define GLOBAL __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))
#define MAP_UINT(name, value) int (*name)[value]
#define MAP_TYPE(name, value) typeof(value) *name

#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_PERCPU_ARRAY 6
#define BPF_MAP_TYPE_ARRAY_OF_MAPS 12
#define BPF_F_MMAPABLE (1 << 10)
#define BPF_F_INNER_MAP (1 << 12)

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static long (*bpf_probe_read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static long (*bpf_loop)(u32 count, void *callback, void *context, u64 flags) = (void *)181;

/* A field of a structure that was reached by a plain number. */
#define READ_FIELD(to, pointer, field)                                                                                   \
	bpf_probe_read_kernel(&(to), sizeof(to), __builtin_preserve_access_index(&(pointer)->field))
