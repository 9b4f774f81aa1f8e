/* gradwire: a parameter server. Servers hold a model's parameters and its optimizer state; workers push gradients and pull
 * parameters. This is what a worker that is not written in Rust needs; docs/c-api.md says how to build, link and use it.
 *
 * Made by cbindgen from src/ffi: `GRADWIRE_BLESS=1 cargo test --test c_header` writes it anew.
 *
 * Every function but the two that give a text gives a gw_status, and on anything but GW_OK leaves a text for gw_last_error;
 * results are written to the caller's memory on GW_OK only. Pointers are the caller's and are not kept beyond the call, but for
 * those of gw_register. Functions may be called from any thread, those of one worker by one thread at a time. */

#ifndef GRADWIRE_H
#define GRADWIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 How a call went. The text of a failure is that of gw_last_error.
 */
typedef enum gw_status {
  /*
   It went well.
   */
  GW_OK = 0,
  /*
   An argument or a setting is wrong: a null pointer, an index, a length, an environment that names no job.
   */
  GW_INVALID = 1,
  /*
   The worker of this handle has been closed, or there never was one.
   */
  GW_CLOSED = 2,
  /*
   Another thread is in a call with this handle.
   */
  GW_BUSY = 3,
  /*
   The handle was opened by another process: a forked child cannot use it.
   */
  GW_FORKED = 4,
  /*
   The deadline passed; the call may be made again.
   */
  GW_TIMEOUT = 5,
  /*
   The launcher or a peer refused this process.
   */
  GW_REFUSED = 6,
  /*
   The job, or this worker's part in it, has failed; the handle can only be closed.
   */
  GW_FAILED = 7,
  /*
   The job was told to stop and has written its checkpoint: end with exit code 75.
   */
  GW_PREEMPTED = 8,
  /*
   The operating system refused: memory, descriptors, files, the network.
   */
  GW_SYSTEM = 9,
  /*
   A bug in gradwire, which was kept from spreading. The handle, if there was one, can only be closed.
   */
  GW_PANIC = 10,
  /*
   This worker was told to leave, and is of the job no more: call gw_finish and end.
   */
  GW_LEFT = 11,
} gw_status;

/*
 The number format of the caller's gradients and parameters. What travels is chosen by the job's own settings.
 */
typedef enum gw_dtype {
  /*
   IEEE 754 binary32: float.
   */
  GW_F32 = 0,
  /*
   bfloat16, 2 bytes.
   */
  GW_BF16 = 1,
  /*
   IEEE 754 binary16, 2 bytes.
   */
  GW_F16 = 2,
} gw_dtype;

/*
 How the servers fill a tensor before the first step; the same bits for any number of servers.
 */
typedef enum gw_init {
  /*
   All zeros.
   */
  GW_INIT_ZEROS = 0,
  /*
   All init_value.
   */
  GW_INIT_CONSTANT = 1,
  /*
   Normal with mean 0 and standard deviation init_value.
   */
  GW_INIT_NORMAL = 2,
  /*
   Uniform on ±sqrt(6 / (fan_in + fan_out)); two dimensions or more.
   */
  GW_INIT_XAVIER_UNIFORM = 3,
  /*
   Normal with standard deviation sqrt(2 / fan_in); two dimensions or more.
   */
  GW_INIT_KAIMING_NORMAL = 4,
} gw_init;

/*
 A worker of this process, as gw_connect gives it; 0 is none. A number, to be copied at will: every copy is the same
 worker. One thread at a time may call with it; a call beside another one's answers GW_BUSY.
 */
typedef uint64_t gw_worker;

/*
 A tensor. All workers give a tensor of one name the same shape, rule and group; the number format is each one's own.
 Set what is not used to zero.
 */
typedef struct gw_tensor {
  /*
   Its name, unique within the model: UTF-8 that ends with a NUL.
   */
  const char *name;
  /*
   Elements along each dimension; may be null for a scalar.
   */
  const uint64_t *shape;
  /*
   How many dimensions; 0 for a scalar.
   */
  size_t dimensions;
  /*
   A gw_dtype.
   */
  uint32_t dtype;
  /*
   A gw_init.
   */
  uint32_t init;
  /*
   What GW_INIT_CONSTANT and GW_INIT_NORMAL need.
   */
  float init_value;
  /*
   The parameter group: 0 is the default one, i the i-th of the optimizer's groups.
   */
  uint16_t group;
} gw_tensor;

/*
 A place in a worker's registered memory.
 */
typedef struct gw_view {
  /*
   The first element, aligned to 32 bytes: in host memory, or of a worker of gw_connect_on_gpu its address on the device.
   */
  void *data;
  /*
   How many elements.
   */
  size_t elements;
  /*
   Their gw_dtype: that of the job, in which they travel.
   */
  uint32_t dtype;
  /*
   The number of the GPU; -1 in host memory.
   */
  int32_t device;
} gw_view;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Changes settings on all servers at one clock: `settings` is a text of KEY=VALUE with spaces between them, such as
 "lr=0.01 weight-decay=0.1 clip-norm=1" (see `gradwire help set`). On GW_OK `clock` is the one from which on they hold; it may
 be null. Waits for the servers, at most a minute, and for no worker.

 # Safety

 `settings` is null or a text that ends with a NUL; `clock` is null or room for a number that nobody else uses during the call.
 */
enum gw_status gw_set(gw_worker worker,
                      const char *settings,
                      uint64_t *clock);

/*
 Asks for a checkpoint at the next clock that no server has passed, and goes on at once: it is complete some steps of all
 workers later, which gw_checkpoint_test tells. One at a time.
 */
enum gw_status gw_checkpoint(gw_worker worker);

/*
 Whether the checkpoint that was asked for is complete; if it is, `clock` is its clock (it may be null), and the next one may be
 asked for. GW_REFUSED, with the reason, if there is none to be had, as in a job without a checkpoint directory. Never waits.

 # Safety

 `done` and `clock` are null or room for what they are told, which nobody else uses during the call.
 */
enum gw_status gw_checkpoint_test(gw_worker worker,
                                  bool *done,
                                  uint64_t *clock);

/*
 How the job stands, as a JSON object that ends with a NUL: what `gradwire status --json` prints (ranks, their state, host, clock
 and fabrics, the last checkpoint, steps that were not finite). `length` is how many bytes it takes with its NUL; where `room`
 is less, only that is written, and the status is GW_INVALID. `out` may be null if `room` is 0. Waits for the launcher, at most 10
 seconds.

 # Safety

 `out` is null or room for `room` bytes, `length` null or room for a number, which nobody else uses during the call.
 */
enum gw_status gw_job_status(gw_worker worker,
                             char *out,
                             size_t room,
                             size_t *length);

/*
 Starts a tensor's step: its gradient of this clock goes to the servers, and the new parameters are on their way back
 until gw_wait or gw_test says that they are here. Tensors may be given in any order, each once a clock.

 `gradient` is the address of `elements` values of the tensor's dtype in host memory, as many as the tensor has. They are
 copied before the call returns: the buffer stays the caller's, and may be changed at once. Never waits for the network.

 # Safety

 `gradient` is null or points to that many values, which nobody changes during the call.
 */
enum gw_status gw_push_pull(gw_worker worker,
                            size_t tensor,
                            const void *gradient,
                            size_t elements);

/*
 The same for a gradient that brings nothing back: gw_wait then waits only until it has left, and gw_pull fetches
 parameters. All pushes of a clock are of one kind.

 # Safety

 As gw_push_pull.
 */
enum gw_status gw_push(gw_worker worker, size_t tensor, const void *gradient, size_t elements);

/*
 Brings all parameters up to `min_version` or later, waiting at most `timeout_ms` milliseconds for the servers to have
 it, and a few seconds more for the way. On GW_TIMEOUT what there was has been brought all the same. Not between
 gw_push_pull and the end of its clock.
 */
enum gw_status gw_pull(gw_worker worker, uint64_t min_version, uint32_t timeout_ms);

/*
 Ends the clock and waits, at most `timeout_ms` milliseconds, until the new parameters are here (after gw_push_pull) or
 the gradients have left (after gw_push). Tensors that were not pushed have no gradient in this clock. On GW_TIMEOUT
 the text names what was waited for, and it may be called again; after GW_OK the next clock has begun.
 */
enum gw_status gw_wait(gw_worker worker, uint32_t timeout_ms);

/*
 Ends the clock as gw_wait does, but without waiting: `done` says whether everything is here already. While it is false
 nothing may be pushed, and this or gw_wait is to be called again; once it is true the next clock has begun.

 # Safety

 `done` is null or room for a bool that nobody else uses during the call.
 */
enum gw_status gw_test(gw_worker worker, bool *done);

/*
 A descriptor for poll or epoll (POLLIN), readable when gw_test is worth calling: call gw_test; while it says false,
 poll and call it again. It is the worker's and is closed with it: neither read nor close it.

 # Safety

 `fd` is null or room for an int that nobody else uses during the call.
 */
enum gw_status gw_completion_fd(gw_worker worker, int *fd);

/*
 Copies a tensor's parameters into `out`, room for `elements` values of the tensor's dtype, as many as the tensor has.
 Not between gw_push_pull and the end of its clock: they are on their way then. The buffer stays the caller's.

 # Safety

 `out` is null or room for that many values, which nobody else uses during the call.
 */
enum gw_status gw_parameters(gw_worker worker, size_t tensor, void *out, size_t elements);

/*
 Takes this process' place in the job that its environment names (`gradwire run` sets it), declares the tensors, which
 are numbered from 0 in this order, and waits for the first parameters: until all workers are there, or the job's own
 deadlines pass.

 `tensors` is the address of `count` descriptions; they, their names and shapes are copied, and stay the caller's. On
 GW_OK `worker` is a new handle, to be ended with gw_finish or gw_close. One process has one worker, unless its
 environment leaves the rank open. Any thread; the library starts threads of its own, which need no signal.

 # Safety

 Each pointer is null or points to what is said of it; `worker` is nobody else's during the call.
 */
enum gw_status gw_connect(const struct gw_tensor *tensors, size_t count, gw_worker *worker);

/*
 As gw_connect, with the worker's gradients and parameters in the memory of GPU number `device` (as CUDA counts those
 that this process sees), in its primary context, which CUDA's runtime uses too. Gradients leave from there, and
 parameters land there, without passing through the host. gw_gradient_view and gw_parameter_view give device pointers;
 whoever has written a gradient waits for its stream or event before gw_push_pull_in_place, which reads it at once.
 Calls that take addresses in host memory copy to the device and back, and wait for that.

 All servers must be reached over a fabric whose device reaches the GPU's memory (verbs); GW_INVALID names the one that
 is not, or says that there is no such GPU.

 # Safety

 As gw_connect.
 */
enum gw_status gw_connect_on_gpu(const struct gw_tensor *tensors, size_t count, uint32_t device, gw_worker *worker);

/*
 This worker has done its part: ends the clock if something has been pushed in it, waits (at most the job's `wait_ms`)
 until every server knows, and leaves the job in order. The handle is closed, whatever the status.
 */
enum gw_status gw_finish(gw_worker worker);

/*
 Leaves the job at once, wherever it stands, and gives back everything that belongs to the worker, its threads and its
 descriptor too. A worker that leaves without gw_finish has failed, and the job ends with it; after a failure that is
 the way to clean up. After gw_finish it answers GW_CLOSED, which does no harm.
 */
enum gw_status gw_close(gw_worker worker);

/*
 This worker's number, from 0.

 # Safety

 `rank` is null or room for a number that nobody else uses during the call.
 */
enum gw_status gw_rank(gw_worker worker, size_t *rank);

/*
 How many workers the job began with.

 # Safety

 `workers` is null or room for a number that nobody else uses during the call.
 */
enum gw_status gw_workers(gw_worker worker, size_t *workers);

/*
 The clock (step) that the next push belongs to; not 0 at first in a job that was resumed.

 # Safety

 `clock` is null or room for a number that nobody else uses during the call.
 */
enum gw_status gw_clock(gw_worker worker, uint64_t *clock);

/*
 Whether this worker was told to leave (`gradwire remove-worker`) and has no clock before it: 1, it is to call gw_finish; else 0.
 To be asked between two clocks; never waits. What it has pushed in earlier clocks counts.

 # Safety

 `leaves` is null or room for a number that nobody else uses during the call.
 */
enum gw_status gw_should_leave(gw_worker worker,
                               int32_t *leaves);

/*
 The version of the parameters at hand: that of the oldest chunk. Under `bsp` it is the number of clocks applied.

 # Safety

 `version` is null or room for a number that nobody else uses during the call.
 */
enum gw_status gw_parameter_version(gw_worker worker, uint64_t *version);

/*
 The number of the tensor with this name. The name is only read.

 # Safety

 `name` is null or a text that ends with a NUL; `tensor` is null or room for a number that nobody else uses during the
 call.
 */
enum gw_status gw_tensor_index(gw_worker worker, const char *name, size_t *tensor);

/*
 What the loss of this clock is to be multiplied by, since the servers divide gradients by it; 1 unless the job has
 `--loss-scale`. Another number may hold after each gw_wait.

 # Safety

 `scale` is null or room for a number that nobody else uses during the call.
 */
enum gw_status gw_loss_scale(gw_worker worker, float *scale);

/*
 Changes the default group's learning rate on every server, from this clock on; the other groups keep their proportion
 to it. Under `bsp` it takes effect at exactly that clock everywhere, if it is called before this worker's first push
 of the clock.
 */
enum gw_status gw_set_learning_rate(gw_worker worker, double rate);

/*
 Where a tensor's gradient lies: write it there and push it with gw_push_pull_in_place, and nothing is copied. The memory is the
 worker's and ends with it. Nothing may be written from the push until the clock has ended.

 # Safety

 `view` is null or room for a view that nobody else uses during the call.
 */
enum gw_status gw_gradient_view(gw_worker worker,
                                size_t tensor,
                                struct gw_view *view);

/*
 Where a tensor's parameters land, to be read only, and not from the push until the clock has ended. The memory is the worker's
 and ends with it.

 # Safety

 `view` is null or room for a view that nobody else uses during the call.
 */
enum gw_status gw_parameter_view(gw_worker worker,
                                 size_t tensor,
                                 struct gw_view *view);

/*
 As gw_push_pull, with the gradient that was written to gw_gradient_view.
 */
enum gw_status gw_push_pull_in_place(gw_worker worker, size_t tensor);

/*
 As gw_push, with the gradient that was written to gw_gradient_view.
 */
enum gw_status gw_push_in_place(gw_worker worker, size_t tensor);

/*
 Tells the worker where the caller keeps a tensor's gradient and parameters, each `elements` values of the tensor's dtype in host
 memory, as many as it has. gw_push_pull_registered then takes the gradient from there, and gw_parameters_registered puts
 the parameters there, each with one copy: the fabrics need memory with a descriptor, which the caller's has not. Both
 addresses are kept until the next gw_register of this tensor, or the worker's end; the memory must stay as long. Null for
 one of them: it is not registered.

 # Safety

 `gradient` and `parameters` are null or point to that many values for as long as they are registered; nobody changes the first
 during gw_push_pull_registered, and nobody else uses the second during gw_parameters_registered.
 */
enum gw_status gw_register(gw_worker worker,
                           size_t tensor,
                           const void *gradient,
                           void *parameters,
                           size_t elements);

/*
 As gw_push_pull, with the gradient at the address that was registered.

 # Safety

 As gw_register said.
 */
enum gw_status gw_push_pull_registered(gw_worker worker, size_t tensor);

/*
 As gw_parameters, for every tensor whose parameters have a registered address.

 # Safety

 As gw_register said.
 */
enum gw_status gw_parameters_registered(gw_worker worker);

/*
 The version of the library, such as "0.1.0". The text is static. Any thread.
 */
const char *gw_version(void);

/*
 What went wrong in this thread's last call that failed: which call, what happened, to whom, what to do. Empty if none
 has failed. The text belongs to the library; it stays until this thread's next failure or its end. Any thread, each
 its own.
 */
const char *gw_last_error(void);

/*
 What the library writes to standard error: "off", "error", "warn", "info", "debug" or "trace". Without this call it is
 what GRADWIRE_LOG says, else "warn". It can be changed at any time, from any thread. The text is only read.

 # Safety

 `level` is null or a text that ends with a NUL.
 */
enum gw_status gw_set_log_level(const char *level);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* GRADWIRE_H */
