/* Starts the CNI executable with the Python beside it: DIR/pynet-cni runs DIR/pynet-runtime, wherever DIR is.
 *
 * Static, so that the host needs no loader, no C library and no shell. The name it is called by says which executable
 * it is (pynet-cni or pynet-ipam), so one file under two names does. */

#define _GNU_SOURCE
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fail(const char *what, const char *where)
{
    printf("{\"cniVersion\":\"1.0.0\",\"code\":999,\"msg\":\"%s: %s: %m\"}\n", where, what);
    return 1;
}

int main(void)
{
    char self[PATH_MAX], root[PATH_MAX], loader[PATH_MAX + 16], libraries[PATH_MAX + 16], python[PATH_MAX + 32];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length < 0)
        return fail("cannot find itself", "/proc/self/exe");
    self[length] = 0;
    char *slash = strrchr(self, '/');
    const char *name = slash + 1;
    /* Resolved here: a new runtime put in its place meanwhile must not be mixed with this one. */
    char *end = slash + 1;
    if ((size_t)(end - self) + sizeof "pynet-runtime" > sizeof self)
        return fail("path too long", self);
    int ipam = strstr(name, "ipam") != NULL;
    const char *code = ipam
        ? "import sys; from cni import client; client.ONLY_IPAM = True; sys.exit(client.main())"
        : "import sys; from cni import client; sys.exit(client.main())";
    strcpy(end, "pynet-runtime");
    if (!realpath(self, root))
        return fail("no runtime beside the executable", self);
    snprintf(loader, sizeof loader, "%s/lib/ld.so", root);
    snprintf(libraries, sizeof libraries, "%s/lib", root);
    snprintf(python, sizeof python, "%s/bin/python3.11", root);
    char *const arguments[] = {
        loader, "--library-path", libraries, "--argv0", python, python, "-IS", "-c", (char *)code, NULL,
    };
    execv(loader, arguments);
    return fail("cannot start the runtime", loader);
}
