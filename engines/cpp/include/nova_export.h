/*
 * nova_export.h: images and videos from a nova-export bundle, without Python.
 *
 *     nova_pipeline* pipeline = NULL;
 *     nova_result* result = NULL;
 *     nova_load_options load = NOVA_LOAD_OPTIONS_INIT;
 *     nova_generate_options options = NOVA_GENERATE_OPTIONS_INIT;
 *     const char* prompt = "a red circle moving right";
 *     options.prompts = &prompt, options.num_prompts = 1, options.max_latent_length = 9;
 *     if (nova_load("bundle", &load, &pipeline) || nova_generate(pipeline, &options, &result))
 *         fprintf(stderr, "%s\n", nova_last_error());
 *     nova_result_free(result);
 *     nova_free(pipeline);
 *
 * Functions that can fail return NOVA_OK or the kind of failure; nova_last_error() says more. No exception crosses
 * this interface. A pipeline serves one call at a time: a second one waits. Pipelines are independent of each other
 * and may run in different threads at the same time.
 *
 * All structures begin with their size, as the caller knows it: set them with the _INIT macros. A library with the
 * same NOVA_ABI_VERSION takes structures of older, shorter versions, and reads nothing that they do not have.
 */
#ifndef NOVA_EXPORT_H
#define NOVA_EXPORT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NOVA_ABI_VERSION 1

#if defined(_WIN32)
#define NOVA_API
#else
#define NOVA_API __attribute__((visibility("default")))
#endif

/* Kinds of failures; the same numbers as the exit codes of the nova-export command. */
typedef enum nova_status {
    NOVA_OK = 0,
    NOVA_ERROR = 1,            /* a bug in this library, or a lack of memory */
    NOVA_USAGE_ERROR = 2,      /* an argument, or a combination of them, that cannot be carried out */
    NOVA_CHECKPOINT_ERROR = 3, /* a checkpoint that cannot be run, such as by its scheduler */
    NOVA_BUNDLE_ERROR = 4,     /* a bundle that is incomplete, changed, unsafe or of another version */
    NOVA_INPUT_ERROR = 5,      /* a prompt, class or image that cannot be used */
    NOVA_STAGE_ERROR = 8,      /* a stage failed while it ran */
    NOVA_DEPENDENCY_ERROR = 9, /* a backend that this library was compiled without, or that is too old */
    NOVA_MEMORY_ERROR = 10,    /* there is less memory than the work needs */
    NOVA_CANCELLED = 130       /* by a callback, or by nova_cancel */
} nova_status;

typedef struct nova_pipeline nova_pipeline; /* an opened bundle */
typedef struct nova_result nova_result;     /* what one call made */

/* NOVA_ABI_VERSION of the library that is loaded. Another than the header's: do not call it. */
NOVA_API uint32_t nova_abi_version(void);
/* Such as "0.1.0". */
NOVA_API const char* nova_version(void);
/* Of the last function that failed in this thread; valid until the next that fails. Never NULL. */
NOVA_API const char* nova_last_error(void);

/* ---- Loading ---- */

typedef struct nova_load_options {
    size_t size;        /* sizeof(nova_load_options) */
    const char* device; /* "cpu", "cuda", or a target that the bundle has engines for; NULL chooses */
    int32_t threads;    /* of ONNX Runtime; 0 leaves their number to it */
    int32_t low_memory; /* not 0: keep only one phase's stages loaded */
    int32_t vae_tile;   /* decode squares of so many latents a side and blend them: less memory, not exact; 0: whole */
} nova_load_options;

#define NOVA_LOAD_OPTIONS_INIT {sizeof(nova_load_options), NULL, 0, 0, 0}

/* Open a bundle folder. Stages are loaded, and their files checked, when they are first needed. */
NOVA_API nova_status nova_load(const char* bundle, const nova_load_options* options, nova_pipeline** pipeline);
/* Free all. Not while a call of it runs. NULL is nothing. */
NOVA_API void nova_free(nova_pipeline* pipeline);
/* Free loaded stages; the next call loads them again. */
NOVA_API nova_status nova_unload(nova_pipeline* pipeline);

/* What a bundle makes. */
typedef struct nova_info {
    size_t size;
    int32_t height, width;        /* of frames, in pixels */
    int32_t is_video;             /* 0: images alone; max_latent_length must be 1 */
    int32_t is_class_conditional; /* prompts are class ids */
    int32_t latent_frames;        /* the usual max_latent_length */
    int32_t latent_channels, latent_height, latent_width;
    int32_t text_tokens;   /* the most of a prompt that counts */
    double guidance_scale; /* where a caller names none */
    double fps;            /* frames a second that videos are made for */
    const char* device;    /* where it runs; valid as long as the pipeline */
} nova_info;

#define NOVA_INFO_INIT {sizeof(nova_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, NULL}

NOVA_API nova_status nova_describe(const nova_pipeline* pipeline, nova_info* info);

/* ---- Generating ---- */

/* One finished autoregressive step. */
typedef struct nova_step {
    size_t size;
    int64_t frame, num_frames; /* latent frames; of an image-to-video call the first is given, and has no steps */
    int64_t step, num_steps;   /* of this frame */
    const float* latents;      /* of the frame so far (samples, channels, height, width); valid in the call alone */
} nova_step;

/* One decoded frame of every sample. */
typedef struct nova_frame {
    size_t size;
    int64_t index; /* in the video */
    int64_t samples, height, width;
    const uint8_t* pixels; /* RGB (samples, height, width, 3); valid in the call alone */
} nova_frame;

/* Return 0 to go on, anything else to cancel. They are called in the thread that called nova_generate, and may not
 * call it, or nova_free. */
typedef int (*nova_step_callback)(const nova_step* step, void* user_data);
typedef int (*nova_frame_callback)(const nova_frame* frame, void* user_data);

/* A scale that is not given: the checkpoint's own, or the argument's default. */
#define NOVA_UNSET (-1.0)

/* Names and defaults are those of nova_export's Python interface (docs/cli.md, `run`). */
typedef struct nova_generate_options {
    size_t size;
    const char* const* prompts; /* UTF-8 */
    size_t num_prompts;
    const int64_t* class_ids; /* instead of prompts where the bundle is class-conditional */
    size_t num_class_ids;
    const char* const* negative_prompts; /* one, or one a prompt; none: the empty text */
    size_t num_negative_prompts;
    const int64_t* negative_class_ids; /* likewise; none: the null class */
    size_t num_negative_class_ids;
    const uint8_t* image; /* RGB (image_height, image_width, 3), the first frame of a video; NULL: none */
    int64_t image_height, image_width;
    int64_t num_images_per_prompt;
    int64_t max_latent_length;   /* latent frames; 1 makes an image */
    int64_t num_inference_steps; /* autoregressive steps of a frame */
    int64_t num_diffusion_steps; /* denoising steps of each autoregressive step */
    double guidance_scale;       /* NOVA_UNSET: the checkpoint's own; 1 or less is off */
    double min_guidance_scale;   /* at the first step, growing to guidance_scale at the last; NOVA_UNSET: the same */
    double guidance_trunc;       /* below this timestep only the conditional pass counts */
    double guidance_renorm;      /* least factor that scales a guided prediction to the conditional's norm; 1 is off */
    double image_guidance_scale;
    double spatiotemporal_guidance_scale;
    double flow_shift;  /* of flow-matching checkpoints; NOVA_UNSET or 0: the checkpoint's own */
    double motion_flow; /* mean optical-flow magnitude to ask for */
    int32_t has_seed;   /* 0 draws one */
    uint64_t seed;      /* draws as torch's CPU generator */
    nova_step_callback on_step;
    nova_frame_callback on_frame; /* if given, frames are decoded, and told, as soon as they can be */
    void* user_data;
} nova_generate_options;

#define NOVA_GENERATE_OPTIONS_INIT                                                                                     \
    {                                                                                                                  \
        sizeof(nova_generate_options), NULL, 0, NULL, 0, NULL, 0, NULL, 0, NULL, 0, 0, 1, 1, 64, 25, NOVA_UNSET,       \
            NOVA_UNSET, 0.0, 1.0, 0.0, 0.0, NOVA_UNSET, 5.0, 0, 0, NULL, NULL, NULL                                    \
    }

/* Generate and decode. `result` may be NULL where on_frame takes all. */
NOVA_API nova_status nova_generate(nova_pipeline* pipeline, const nova_generate_options* options, nova_result** result);
/* Make the call that runs now, if one does, return NOVA_CANCELLED after its next step or tile. From any thread. */
NOVA_API void nova_cancel(nova_pipeline* pipeline);

/* ---- Results ---- */

/* RGB (samples, frames, height, width, 3). Valid until the result is freed, like all that a result gives. */
NOVA_API const uint8_t* nova_result_frames(const nova_result* result, int64_t shape[5]);
/* (samples, channels, latent frames, height, width), scaled as the model makes them. */
NOVA_API const float* nova_result_latents(const nova_result* result, int64_t shape[5]);
NOVA_API uint64_t nova_result_seed(const nova_result* result);
/* What was cut to fit, such as a long prompt: texts, NULL behind the last. */
NOVA_API const char* const* nova_result_notices(const nova_result* result);

/* What a stage took of the call, in seconds. */
typedef struct nova_stage_time {
    const char* stage;
    int64_t calls;
    double load_seconds; /* checking files and loading them, where the call was the first to need it */
    double run_seconds;
} nova_stage_time;

NOVA_API const nova_stage_time* nova_result_stage_times(const nova_result* result, size_t* count);
/* From first to last. */
NOVA_API double nova_result_seconds(const nova_result* result);
NOVA_API void nova_result_free(nova_result* result);

#ifdef __cplusplus
}
#endif

#endif
