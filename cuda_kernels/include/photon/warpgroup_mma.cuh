// wgmma of sm_90a: four warps multiply 64 rows with N columns, both straight from shared memory.
//
// Both operands lie as rows of 64 16-bit values of k (128 bytes), eight to a block of 1,024 bytes; the 16 bytes
// c of row r at place c ^ (r % 8) (the 128-byte swizzle). Warp w holds rows 16w .. 16w + 15 of the result, as
// four floats for every eight columns, laid out as those of mma m16n8k16 (photon/attention_mma.cuh).
//
// Where the rows are registers (`add_rows`), they are the A words of mma m16n8k16, and the columns lie the other
// way: a row of 128 bytes has 64 columns of one k.
#pragma once

#include "photon/types.cuh"

namespace photon {

// Where an operand starts, a multiple of 1,024 bytes plus 32 for every 16 of k.
__device__ __forceinline__ u64 matrix_descriptor(u32 address) {
    constexpr u64 kBlockBytes = 1024, kSwizzle128 = 1;
    return (address & 0x3FFFF) >> 4 | u64{1} << 16 | kBlockBytes / 16 << 32 | kSwizzle128 << 62;
}

// What other threads' copies and stores put into shared memory is seen by wgmma, once this and a barrier are
// behind them.
__device__ __forceinline__ void publish_to_warpgroups() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for columns that lie as rows of 64 columns for each k: 2,048 bytes for every 16 of k, the next 64
// columns `column_bytes` further on.
__device__ __forceinline__ u64 column_descriptor(u32 address, u32 column_bytes) {
    constexpr u64 kBlockBytes = 1024, kSwizzle128 = 1;
    return (address & 0x3FFFF) >> 4 | static_cast<u64>(column_bytes / 16) << 16 | kBlockBytes / 16 << 32 |
           kSwizzle128 << 62;
}

__device__ __forceinline__ void begin_warpgroup_mma() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void finish_warpgroup_mma() {
    asm volatile("wgmma.commit_group.sync.aligned;\n  wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

__device__ __forceinline__ void commit_warpgroup_mma() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// All but the latest `kNewer` committed groups are done.
template <int kNewer>
__device__ __forceinline__ void wait_for_warpgroup_mma() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewer) : "memory");
}

// Keeps the compiler from moving a sum away while wgmma adds to it.
__device__ __forceinline__ void pin(float& sum) {
    asm volatile("" : "+f"(sum)::"memory");
}

template <int kSize>
__device__ __forceinline__ void pin(float (&sums)[kSize][4]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
        for (int one = 0; one < 4; ++one) pin(sums[i][one]);
    }
}

// add: sums += 64 rows at `a` times the columns at `b`, 16 of k. start: the same in place of what is there.
// add_rows: the rows in registers.
template <typename T>
struct WarpgroupMma;

#define PHOTON_SUMS(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define PHOTON_REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define PHOTON_OPERANDS_8 PHOTON_SUMS(0), PHOTON_SUMS(1)
#define PHOTON_REGISTERS_16 PHOTON_REGISTERS_8 "," "%8,%9,%10,%11,%12,%13,%14,%15"
#define PHOTON_OPERANDS_16 PHOTON_OPERANDS_8, PHOTON_SUMS(2), PHOTON_SUMS(3)
#define PHOTON_REGISTERS_24 PHOTON_REGISTERS_16 "," "%16,%17,%18,%19,%20,%21,%22,%23"
#define PHOTON_OPERANDS_24 PHOTON_OPERANDS_16, PHOTON_SUMS(4), PHOTON_SUMS(5)
#define PHOTON_REGISTERS_32 PHOTON_REGISTERS_24 "," "%24,%25,%26,%27,%28,%29,%30,%31"
#define PHOTON_OPERANDS_32 PHOTON_OPERANDS_24, PHOTON_SUMS(6), PHOTON_SUMS(7)
#define PHOTON_REGISTERS_48 PHOTON_REGISTERS_32 "," "%32,%33,%34,%35,%36,%37,%38,%39," \
    "%40,%41,%42,%43,%44,%45,%46,%47"
#define PHOTON_OPERANDS_48 PHOTON_OPERANDS_32, PHOTON_SUMS(8), PHOTON_SUMS(9), PHOTON_SUMS(10), \
    PHOTON_SUMS(11)
#define PHOTON_REGISTERS_64 PHOTON_REGISTERS_48 "," "%48,%49,%50,%51,%52,%53,%54,%55," \
    "%56,%57,%58,%59,%60,%61,%62,%63"
#define PHOTON_OPERANDS_64 PHOTON_OPERANDS_48, PHOTON_SUMS(12), PHOTON_SUMS(13), PHOTON_SUMS(14), \
    PHOTON_SUMS(15)

#define PHOTON_OPERANDS_96 PHOTON_OPERANDS_64, PHOTON_SUMS(16), PHOTON_SUMS(17), PHOTON_SUMS(18), \
    PHOTON_SUMS(19), PHOTON_SUMS(20), PHOTON_SUMS(21), PHOTON_SUMS(22), PHOTON_SUMS(23)
#define PHOTON_OPERANDS_128 PHOTON_OPERANDS_96, PHOTON_SUMS(24), PHOTON_SUMS(25), PHOTON_SUMS(26), \
    PHOTON_SUMS(27), PHOTON_SUMS(28), PHOTON_SUMS(29), PHOTON_SUMS(30), PHOTON_SUMS(31)
#define PHOTON_REGISTERS_128 PHOTON_REGISTERS_64 "," "%64,%65,%66,%67,%68,%69,%70,%71," \
    "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87," \
    "%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103," \
    "%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119," \
    "%120,%121,%122,%123,%124,%125,%126,%127"

#define PHOTON_WARPGROUP_MMA_OF(name, adds, type, n, count, a_register, b_register)                        \
    __device__ __forceinline__ static void name(float(&sums)[n / 8][4], u64 a, u64 b) {                    \
        asm volatile("{ .reg .pred adds;\n"                                                                \
                     "  setp.ne.u32 adds, " adds ", 0;\n"                                                  \
                     "  wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                      \
                     " {" PHOTON_REGISTERS_##count "}, " a_register ", " b_register ", adds, 1, 1, 0, 0; }" \
                     : PHOTON_OPERANDS_##count                                                             \
                     : "l"(a), "l"(b)                                                                      \
                     : "memory");                                                                          \
    }
#define PHOTON_WARPGROUP_MMA_ROWS_OF(type, n, count, a0, a1, a2, a3, b_register)                           \
    __device__ __forceinline__ static void add_rows(float(&sums)[n / 8][4], const u32(&a)[4], u64 b) {     \
        asm volatile("{ .reg .pred adds;\n"                                                                \
                     "  setp.ne.u32 adds, 1, 0;\n"                                                         \
                     "  wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                      \
                     " {" PHOTON_REGISTERS_##count "}, {" a0 "," a1 "," a2 "," a3 "}, " b_register           \
                     ", adds, 1, 1, 1; }"                                                                  \
                     : PHOTON_OPERANDS_##count                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                  \
                     : "memory");                                                                          \
    }
#define PHOTON_WARPGROUP_MMAS(type)                                              \
    PHOTON_WARPGROUP_MMA_OF(add, "1", type, 16, 8, "%8", "%9")                   \
    PHOTON_WARPGROUP_MMA_OF(add, "1", type, 32, 16, "%16", "%17")                \
    PHOTON_WARPGROUP_MMA_OF(add, "1", type, 48, 24, "%24", "%25")                \
    PHOTON_WARPGROUP_MMA_OF(add, "1", type, 64, 32, "%32", "%33")                \
    PHOTON_WARPGROUP_MMA_OF(add, "1", type, 96, 48, "%48", "%49")                \
    PHOTON_WARPGROUP_MMA_OF(add, "1", type, 128, 64, "%64", "%65")               \
    PHOTON_WARPGROUP_MMA_OF(add, "1", type, 256, 128, "%128", "%129")            \
    PHOTON_WARPGROUP_MMA_OF(start, "0", type, 64, 32, "%32", "%33")              \
    PHOTON_WARPGROUP_MMA_OF(start, "0", type, 128, 64, "%64", "%65")             \
    PHOTON_WARPGROUP_MMA_OF(start, "0", type, 256, 128, "%128", "%129")          \
    PHOTON_WARPGROUP_MMA_ROWS_OF(type, 64, 32, "%32", "%33", "%34", "%35", "%36") \
    PHOTON_WARPGROUP_MMA_ROWS_OF(type, 128, 64, "%64", "%65", "%66", "%67", "%68")

template <>
struct WarpgroupMma<bf16> {
    PHOTON_WARPGROUP_MMAS("bf16")
};

template <>
struct WarpgroupMma<f16> {
    PHOTON_WARPGROUP_MMAS("f16")
};

#undef PHOTON_WARPGROUP_MMAS
#undef PHOTON_WARPGROUP_MMA_ROWS_OF
#undef PHOTON_WARPGROUP_MMA_OF
#undef PHOTON_SUMS

}  // namespace photon
