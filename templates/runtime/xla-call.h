/* xla-call.h: a call of XLA's foreign function interface, as the handlers of all platforms read it.
 *
 * xla-c-api.h is XLA's own header; xla-kernels.h names a rule and lists its kernels, one for each way in
 * which its arrays are stored.
 *
 * Operands: the count of steps, an int32; the numbers of the attribute `traced`, floats or doubles; then of
 * each tensor its arrays, in the order of the kernel: p, g, the state, maybe a master. Results: the count; of
 * each tensor all arrays but g, each in the memory of its operand; where `stats` is set, norms and counts, a
 * row of all tensors together and one of each; and on a GPU scratch memory.
 */
#ifndef OPTFORGE_XLA_CALL_H
#define OPTFORGE_XLA_CALL_H

#include "xla-c-api.h"
#include "xla-kernels.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum {
    NORMS = 5,
    COUNTS = 3,
    MESSAGE = 512,
    KINDS = sizeof kernels / sizeof *kernels
};

static XLA_FFI_Error *failure(const XLA_FFI_Api *api, XLA_FFI_Error_Code code, const char *text) {
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, text, code};
    return api->XLA_FFI_Error_Create(&args);
}

static const void *attribute(const XLA_FFI_Attrs *attrs, const char *name) {
    for (int64_t k = 0; k < attrs->size; k++)
        if (attrs->names[k]->len == strlen(name) && memcmp(attrs->names[k]->ptr, name, strlen(name)) == 0)
            return attrs->attrs[k];
    return NULL;
}

static const XLA_FFI_Array *array(const XLA_FFI_Attrs *attrs, const char *name) {
    return (const XLA_FFI_Array *)attribute(attrs, name);
}

static uint64_t number(const XLA_FFI_Attrs *attrs, const char *name) {
    return *(const uint64_t *)((const XLA_FFI_Scalar *)attribute(attrs, name))->value;
}

static double scale(const XLA_FFI_Attrs *attrs) {
    return *(const double *)((const XLA_FFI_Scalar *)attribute(attrs, "grad_scale"))->value;
}

static size_t elements(const XLA_FFI_Buffer *x) {
    size_t n = 1;
    for (int64_t k = 0; k < x->rank; k++)
        n *= (size_t)x->dims[k];
    return n;
}

/* Answers XLA's question which version of the interface this is for, if it asks that instead of a step. No
 * handler says that it may be captured in a command buffer. */
static int told_version(XLA_FFI_CallFrame *call) {
    XLA_FFI_Extension_Base *extension = call->extension_start;
    XLA_FFI_Metadata *metadata;
    if (extension == NULL || extension->type != XLA_FFI_Extension_Metadata)
        return 0;
    metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
    metadata->api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
    return 1;
}

/* What XLA calls: to learn that version, and for each step. */
#ifdef __cplusplus
extern "C"
#endif
XLA_FFI_Error *optforge_xla_step(XLA_FFI_CallFrame *call);

#endif /* OPTFORGE_XLA_CALL_H */
