/* The C interface in one file: minimal BUNDLE PROMPT OUT.ppm writes the first frame of a video as it is decoded. */
#include <stdio.h>
#include <string.h>

#include <nova_export.h>

static int show_progress(const nova_step* step, void* user_data) {
    (void)user_data;
    fprintf(stderr, "\rframe %d of %d, step %d of %d ", (int)step->frame + 1, (int)step->num_frames,
            (int)step->step + 1, (int)step->num_steps);
    return 0; /* anything else would cancel */
}

static int write_first(const nova_frame* frame, void* user_data) {
    const size_t size = (size_t)(frame->height * frame->width * 3);
    FILE* file;
    int failed;
    if (frame->index != 0)
        return 0;
    file = fopen((const char*)user_data, "wb");
    if (!file)
        return 1;
    failed = fprintf(file, "P6\n%d %d\n255\n", (int)frame->width, (int)frame->height) < 0 ||
             fwrite(frame->pixels, 1, size, file) != size;
    return fclose(file) != 0 || failed;
}

int main(int argc, char** argv) {
    nova_load_options load = NOVA_LOAD_OPTIONS_INIT;
    nova_generate_options options = NOVA_GENERATE_OPTIONS_INIT;
    nova_info info = NOVA_INFO_INIT;
    nova_pipeline* pipeline = NULL;
    nova_status status;
    const char* prompt;

    if (argc != 4) {
        fprintf(stderr, "usage: %s BUNDLE PROMPT OUT.ppm\n", argv[0]);
        return NOVA_USAGE_ERROR;
    }
    prompt = argv[2];
    status = nova_load(argv[1], &load, &pipeline);
    if (status == NOVA_OK)
        status = nova_describe(pipeline, &info);
    if (status == NOVA_OK) {
        options.prompts = &prompt;
        options.num_prompts = 1;
        options.max_latent_length = info.latent_frames;
        options.num_inference_steps = 8; /* fewer than the usual 64: a quick look */
        options.has_seed = 1;
        options.seed = 1;
        options.on_step = show_progress;
        options.on_frame = write_first;
        options.user_data = argv[3];
        status = nova_generate(pipeline, &options, NULL);
    }
    if (status != NOVA_OK)
        fprintf(stderr, "\n%s\n", nova_last_error());
    else
        fprintf(stderr, "\nwrote %s\n", argv[3]);
    nova_free(pipeline);
    return (int)status;
}
