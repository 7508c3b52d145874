// flowturbo_kernels._C: one m.def a line, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "kernels.h"

namespace py = pybind11;
using flowturbo::BuildInfo;

PYBIND11_MODULE(_C, m) {
    py::class_<BuildInfo>(m, "BuildInfo")
        .def_readonly("cuda_version", &BuildInfo::cuda_version)
        .def_readonly("architectures", &BuildInfo::architectures)
        .def_readonly("devices", &BuildInfo::devices)
        .def_readonly("problem", &BuildInfo::problem);
    m.def("build_info", &flowturbo::build_info);
    m.def("names", &flowturbo::names);
    m.def("launch", &flowturbo::launch);
    m.def("run_on_host", &flowturbo::run_on_host);
}
