// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SHARD_WRITER_H_
#define LAYERWISE_SHARD_WRITER_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "layerwise/env.h"
#include "layerwise/plan.h"
#include "layerwise/writer_pool.h"

namespace layerwise {

// Writes one shard: blocks from the tensors' own memory, hashed while they are
// written, then the header.
//
// The lease. From Submit on, the pool or the kernel may read the memory under a
// block. REQUIRES: that memory stays mapped and unchanged until the block is no longer
// leased. That is when it is both written and hashed (the two see the same bytes),
// when Evacuate has copied it, or when it failed or was cancelled. Bytes in flight are
// at most the pool's depth times the length of a block, so waiting for those is short.
//
// Failure. The first failure of a block, of the header, of the flush or of the
// close poisons the file: what is queued is cancelled, no flush is tried again,
// and Finish never succeeds. The file stays on disk for its owner to remove.
//
// Survives a crash: after a successful Finish, all bytes of the file. Its name is
// the caller's to make durable (Env::SyncDir).
//
// Threads: every method may be called by several threads at once, except that
// SetAddress REQUIRES that no pending block has a segment of that tensor. In a
// child made by fork only the destructor may be called; there it does nothing.
class ShardWriter final : public BlockSink {
 public:
  // Creates the file and reserves the plan's space in it. If the latter fails the
  // file is removed again. REQUIRES: env and pool outlive the writer.
  static Status Create(Env* env, WriterPool* pool, std::shared_ptr<const Plan> plan,
                       const std::string& path, uint32_t mode, bool direct,
                       std::unique_ptr<ShardWriter>* writer);

  // What a shard's file is made from. After a power loss either name of `spare` may be
  // there.
  struct Target {
    std::string folder;  // made if it is not there
    uint32_t folder_mode = 0700;
    std::string path;  // in it
    uint32_t mode = 0600;
    bool direct = false;
    // Unless empty: a retired file that Env::ReuseFile turns into `path`, with its
    // space. Its old bytes stay where nothing is written; Finish cuts off what is
    // past the new end. If it is refused it is removed and a new file made: see
    // reuse_refused(). REQUIRES: its header is blank and flushed, so that no crash can
    // leave it above a mixture of old and new blocks.
    std::string spare;
    // A writer of `path`, aborted or about to be: its file goes first.
    std::shared_ptr<ShardWriter> before;
  };

  // As Create, but returns at once, and has the file made by the pool's errands. Until
  // it is there blocks are only queued; they may be evacuated. If it can't be made, they
  // fail, and the writer is poisoned by the reason: nothing of it stays on disk then, as
  // of a writer that is aborted before. InvalidArgument as Create.
  static Status Order(Env* env, WriterPool* pool, std::shared_ptr<const Plan> plan, Target target,
                      std::unique_ptr<ShardWriter>* writer);

  // Abort(), as long as that takes.
  ~ShardWriter() override;

  // No block is hashed: BlockHash is nullopt, Hashes gives none, and a lease ends when
  // the block is written. REQUIRES: nothing was submitted or appended.
  void SkipHashes() { hashing_ = false; }

  // Where tensor `tensor` begins in memory; 0: not known yet, so that none of its blocks
  // can be submitted. InvalidArgument, and where it was stays, for what is not mapped.
  Status SetAddress(size_t tensor, uintptr_t address);
  // The same for all of them, up to the first that is not mapped. REQUIRES: one address for
  // each tensor of the plan.
  Status SetAddresses(const std::vector<uintptr_t>& addresses);

  // Queues blocks of the plan and returns at once. What lies in memory as direct I/O
  // wants it is written straight from there: of a segment whose address is congruent
  // to its place in the file modulo alignment().memory, all but the partial sectors at
  // its ends. The rest is copied first. Without direct I/O nothing is copied, unless a
  // block would be in more than 64 pieces. A block may be submitted again once it is
  // complete; its hash is then replaced. On a poisoned or aborted writer this does
  // nothing.
  // FailedPrecondition: a block is pending, an address is missing, or Finish was
  // called. Nothing is queued then.
  Status Submit(size_t first, size_t count);
  // The same for blocks whose segments all lie in `memory`: they are never leased, and
  // the memory goes back to its pool when the last of them is no longer pending.
  Status Submit(size_t first, size_t count, BufferPool::Buffer memory);

  // Copies data to blocks after the last one, padded with zeros to kAlign, and
  // queues them. Stores their number; they are numbered on from the plan's.
  // InvalidArgument if the plan has neither blocks nor a tail offset.
  Status Append(std::string_view data, size_t* blocks);

  // Waits until the file is made, or can't be, and no block is pending; false if that
  // takes longer.
  bool Wait(double timeout_s);

  // Waits until no block is leased; false if that takes longer.
  bool WaitLeases(double timeout_s);

  // Called right before the memory under blocks of the plan is overwritten, which
  // must not begin before this returns. Blocks that have not been started are copied
  // to the pool's buffers, hashed, and written from there later, as far as these have
  // room; what is being written or found no room is waited for. *safe: none of these
  // blocks is leased any more; false if that was not so when the time was up. A copy's
  // memory goes back to the pool when the block is no longer pending.
  // FailedPrecondition if one of the blocks was submitted with memory of its own.
  Status Evacuate(size_t first, size_t count, double timeout_s, bool* safe);

  struct Counts {
    uint64_t submitted = 0;      // blocks queued, repeated ones counted again
    uint64_t completed = 0;      // of these, written and hashed
    uint64_t pending = 0;        // of these, queued or running
    uint64_t leased = 0;         // of these, blocks whose tensors' memory is needed
    uint64_t bytes_written = 0;  // by completed blocks and the header
    uint64_t bytes_copied = 0;   // of tensors on the way to the file, and by Append
    uint64_t bytes_evacuated = 0;  // of these, by Evacuate
  };
  Counts counts() const;

  // When a block was last started and was over, in nanoseconds of CLOCK_MONOTONIC; 0 if
  // it was not yet.
  struct Times {
    int64_t started = 0;
    int64_t ended = 0;
  };
  // Of every block of the plan.
  std::vector<Times> times() const;

  // What poisoned the file; ECANCELED after Abort; OK before that.
  Status error() const;
  // REQUIRES, of both: the file is made.
  bool direct() const { return direct_; }
  DirectIoAlignment alignment() const { return alignment_; }
  // Why the spare was not reused; OK if it was, there was none, or none was tried yet.
  Status reuse_refused() const;

  // The block's hash; nullopt unless it is complete.
  std::optional<uint64_t> BlockHash(size_t index) const;
  // Of every block in order, appended ones last; none after SkipHashes.
  // FailedPrecondition unless all are complete.
  Status Hashes(std::vector<uint64_t>* hashes) const;

  // Writes the header at offset 0, flushes, closes. EIO if the file is poisoned,
  // ECANCELED if it was aborted.
  // FailedPrecondition unless the file is made and every block of the plan is
  // complete, and after a Finish. InvalidArgument unless the header's length is a multiple of kAlign
  // and ends before the first block. Both leave the writer as it was.
  Status Finish(std::string_view header);

  // Cancels what is queued, waits for what is running, closes. Does not unlink.
  // Idempotent; after Finish it does nothing. False if it takes longer: what is running
  // still uses this, the pool and the memory under its blocks, which must not be freed.
  bool Abort(double timeout_s = kNoTimeout);

 private:
  enum class BlockState : uint8_t { kNone, kPending, kComplete, kFailed };
  enum class State { kOpen, kFinishing, kFinished, kClosed };

  // A block made by Append. The memory is freed when the last block of the same
  // call is no longer pending.
  struct TailBlock {
    uint64_t offset;
    size_t length;
    const char* data;
    std::shared_ptr<AlignedBuffer> memory;
  };

  // A block that Evacuate copied.
  struct Evacuated {
    BufferPool::Buffer memory;
    uint64_t hash;
  };

  // Under which such blocks are queued, so that they are not taken back again.
  class EvacuatedSink final : public BlockSink {
   public:
    explicit EvacuatedSink(ShardWriter* writer) : writer_(writer) {}
    bool StartBlock(size_t index, AlignedBuffer* scratch, BlockWrite* write) override;
    void FinishBlock(size_t index, const BlockWrite& write, Status status) override;
    void CancelBlock(size_t index) override;

   private:
    ShardWriter* const writer_;
  };

  // A call of Evacuate that waits for `left` leased blocks of [first, end).
  struct Waiter {
    size_t first;
    size_t end;
    size_t left;
  };

  ShardWriter(WriterPool* pool, std::shared_ptr<const Plan> plan, std::string path);

  Status Make(Env* env, const Target& target);
  void Fill(Env* env, const Target& target, Status refused);
  void Take(std::unique_ptr<WritableFile> file);

  bool StartBlock(size_t index, AlignedBuffer* scratch, BlockWrite* write) override;
  void FinishBlock(size_t index, const BlockWrite& write, Status status) override;
  void CancelBlock(size_t index) override;

  bool StartEvacuated(size_t index, BlockWrite* write);
  void StartTail(size_t index, BlockWrite* write) const;
  void EvacuateQueued(size_t first, size_t count);
  void Requeue(size_t index, BufferPool::Buffer memory, uint64_t copied);

  // REQUIRES, of these: mutex_ is held.
  bool Leased(size_t index) const;  // REQUIRES: the block is pending
  void Keep(size_t first, size_t count, const std::shared_ptr<BufferPool::Buffer>& memory);  // all of it or nothing
  void EndLease(size_t index);
  void EndBlock(size_t index, BlockState state);  // not pending any more
  Status NoSuchBlocks(size_t first, size_t count) const;
  Status CheckSubmit(size_t first, size_t count) const;
  Status CheckFinish(std::string_view header) const;
  Status WriteHeader(std::string_view header);
  Status Poisoned() const;

  WriterPool* const pool_;
  const std::shared_ptr<const Plan> plan_;
  const std::string path_;
  // These four are set before the first block is started.
  std::unique_ptr<WritableFile> file_;
  bool direct_ = false;
  DirectIoAlignment alignment_;
  bool reused_ = false;
  const int process_;
  const std::unique_ptr<std::atomic<uintptr_t>[]> addresses_;
  bool hashing_ = true;

  mutable std::mutex mutex_;
  std::unique_ptr<std::condition_variable> changed_;
  State state_ = State::kOpen;
  bool making_ = false;  // the file
  Status error_;
  Status reuse_refused_;
  std::vector<BlockState> states_;
  std::vector<uint64_t> hashes_;
  std::vector<Times> times_;
  std::vector<TailBlock> tail_;
  EvacuatedSink evacuated_sink_{this};
  std::unordered_map<size_t, Evacuated> evacuated_;
  std::unordered_map<size_t, std::shared_ptr<BufferPool::Buffer>> kept_;  // by block
  std::vector<Waiter*> waiters_;
  uint64_t end_;
  Counts counts_;
};

}  // namespace layerwise

#endif  // LAYERWISE_SHARD_WRITER_H_
