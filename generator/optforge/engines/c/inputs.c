/* inputs.c: looks at the arrays that the Optimizer is given for a step, all in one call: whether each is what it
 * has to be, and where its elements are. Python compiles it for itself; nothing of it is emitted.
 *
 * An array of NumPy is read as its C API lays it out. A tensor of PyTorch is asked through the table of functions
 * that DLPack defines for this. Whatever is not as it should be, or of another library, is left to Python, which
 * looks closer, and knows what to say. The caller holds the interpreter's lock.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A tensor as DLPack describes it. */
typedef struct DLTensor {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;
enum { CPU = 1 };

/* An array of NumPy, behind the head that all objects have. */
typedef struct Array {
    char *data;
    int nd;
    ptrdiff_t *shape, *strides;
    void *base, *dtype;
    int flags;
} Array;
enum { CONTIGUOUS = 0x1, ALIGNED = 0x100, WRITEABLE = 0x400 };

/* What an array has to be. */
typedef struct Form {
    const int64_t *shape, *strides; /* the latter in elements, as DLPack has them */
    uint64_t bytes;                 /* of all elements */
    int32_t ndim;
    int32_t code, bits; /* of one element: what DLPack calls its type, FLOAT or BFLOAT, and its size */
} Form;
enum { FLOAT = 2, BFLOAT = 4 };

typedef struct Inputs {
    /* Python: the bytes of an object's head, which ends with its type; PyList_GetItem, PyErr_Clear */
    size_t head;
    const void *none;
    void *(*item)(void *list, ptrdiff_t k);
    void (*clear)(void);
    const void *ndarray, *float32, *float64; /* NumPy: the type of arrays, and two dtypes */
    const void *tensor, *parameter;          /* PyTorch: the types of tensors, and what describes one */
    int (*describe)(void *tensor, DLTensor *description);

    size_t count;
    const Form *forms;          /* of each parameter and its gradient */
    int32_t zero_grads;         /* gradients are written to as well */
    const uintptr_t *homes;     /* where each parameter was */
    unsigned char *parameters;  /* filled in, of each: 1 where Python has to look at it */
    unsigned char *gradients;   /* filled in, of each: ABSENT … */
    uintptr_t *addresses;       /* filled in: where each gradient is; before, where it was at the last call */
    size_t ranges;              /* the memory that steps write to: parameters and state, in ascending order */
    const uintptr_t *starts, *ends;
} Inputs;

enum { ABSENT, FOUND, ONE, OTHER };               /* a gradient; ONE is a tensor of one element */
enum { PARAMETERS = 1, CHANGED = 2, ASKED = 4, MOVED = 8 }; /* what there is to do: bits of the result */

static const void *type_of(const Inputs *in, const void *object)
{
    const void *type;

    memcpy(&type, (const char *)object + in->head - sizeof type, sizeof type);
    return type;
}

static int look_at_array(const Inputs *in, const void *object, const Form *form, int writes, uintptr_t *address)
{
    const Array *array = (const Array *)((const char *)object + in->head);
    const int wanted = CONTIGUOUS | ALIGNED | (writes ? WRITEABLE : 0);

    if (form->bits < 32 || array->dtype != (form->bits == 32 ? in->float32 : in->float64) ||
        array->nd != form->ndim || (array->flags & wanted) != wanted)
        return OTHER;
    for (int d = 0; d < form->ndim; d++)
        if (array->shape[d] != form->shape[d])
            return OTHER;
    *address = (uintptr_t)array->data;
    return FOUND;
}

static int look_at_tensor(const Inputs *in, void *object, const Form *form, uintptr_t *address)
{
    DLTensor tensor;
    int64_t elements = 1;

    if (in->describe(object, &tensor) != 0) {
        in->clear();
        return OTHER;
    }
    if (tensor.device_type != CPU || tensor.code != form->code || tensor.bits != form->bits || tensor.lanes != 1 ||
        tensor.ndim != form->ndim)
        return OTHER;
    for (int d = 0; d < form->ndim; elements *= tensor.shape[d++])
        if (tensor.shape[d] != form->shape[d] ||
            (tensor.shape[d] != 1 && tensor.strides[d] != form->strides[d] && form->bytes != 0))
            return OTHER;
    *address = (uintptr_t)tensor.data + (uintptr_t)tensor.byte_offset;
    if (*address % (uintptr_t)(form->bits / 8) != 0)
        return OTHER;
    return elements == 1 ? ONE : FOUND;
}

/* What an array is, and its address: 0 where it has no elements. */
static int look(const Inputs *in, void *object, const Form *form, int writes, uintptr_t *address)
{
    const void *type = type_of(in, object);
    int kind = OTHER;

    *address = 0;
    if (object == in->none)
        return ABSENT;
    if (type == in->ndarray)
        kind = look_at_array(in, object, form, writes, address);
    else if (in->describe != NULL && (type == in->tensor || type == in->parameter))
        kind = look_at_tensor(in, object, form, address);
    if (form->bytes == 0)
        *address = 0;
    else if (*address == 0)
        return OTHER;
    return kind;
}

/* The first of the ranges that ends behind an address. `near` is that of another one, from which it is often not far:
 * gradients of one step lie where memory was free, one behind the other. */
static size_t behind(const Inputs *in, uintptr_t address, size_t near)
{
    size_t low = 0, high = in->ranges;

    if ((near == 0 || in->ends[near - 1] <= address) && (near == high || in->ends[near] > address))
        return near;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;

        if (in->ends[middle] <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Whether bytes from an address on are in memory that steps write to. */
static int overlaps(const Inputs *in, uintptr_t address, uint64_t bytes, size_t *near)
{
    *near = behind(in, address, *near);
    return bytes != 0 && *near < in->ranges && in->starts[*near] < address + bytes;
}

/* Thousands of arrays are in no cache near by: what is looked at soon is fetched ahead. What PyTorch keeps of a tensor
 * is where the first word behind the head points; were it elsewhere, nothing would go wrong. */
enum { MANY = 512, OBJECTS_AHEAD = 8, TENSORS_AHEAD = 4, LINE = 64, LINES = 4 };

static void fetch_ahead(const Inputs *in, void *list, size_t k)
{
    const char *object, *tensor;

    if (in->count < MANY || k + OBJECTS_AHEAD >= in->count)
        return;
    __builtin_prefetch(in->item(list, (ptrdiff_t)(k + OBJECTS_AHEAD)));
    object = in->item(list, (ptrdiff_t)(k + TENSORS_AHEAD));
    if (in->describe == NULL || (type_of(in, object) != in->tensor && type_of(in, object) != in->parameter))
        return;
    memcpy(&tensor, object + in->head, sizeof tensor);
    for (int line = 0; line < LINES; line++)
        __builtin_prefetch(tensor + LINE * line);
}

int optforge_inputs(Inputs *in, void *parameters, void *gradients)
{
    int result = 0;
    size_t near = 0;

    for (size_t k = 0; k < in->count; k++) {
        const Form *form = &in->forms[k];
        uintptr_t address;

        fetch_ahead(in, parameters, k);
        fetch_ahead(in, gradients, k);

        int kind = look(in, in->item(parameters, (ptrdiff_t)k), form, 1, &address);

        in->parameters[k] = kind == OTHER || (kind != ABSENT && form->bytes != 0 && address != in->homes[k]);
        result |= in->parameters[k] ? PARAMETERS : 0;
        kind = look(in, in->item(gradients, (ptrdiff_t)k), form, in->zero_grads, &address);
        if (address != in->addresses[k] && overlaps(in, address, form->bytes, &near))
            kind = OTHER;
        if (kind == OTHER)
            address = 0;
        result |= kind == ONE || kind == OTHER ? ASKED : 0;
        result |= address != in->addresses[k] ? MOVED : 0;
        result |= (kind == ABSENT) != (in->gradients[k] == ABSENT) ? CHANGED : 0; /* other tensors have one */
        in->gradients[k] = (unsigned char)kind;
        in->addresses[k] = address;
    }
    return result;
}
