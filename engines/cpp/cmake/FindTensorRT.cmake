# TensorRT and CUDA's runtime: TensorRT::TensorRT, from TENSORRT_ROOT (a release) or the system.
find_path(TensorRT_INCLUDE_DIR NvInfer.h HINTS "${TENSORRT_ROOT}" PATH_SUFFIXES include)
find_library(TensorRT_LIBRARY nvinfer HINTS "${TENSORRT_ROOT}" PATH_SUFFIXES lib lib64)
find_package(CUDAToolkit QUIET)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_LIBRARY TensorRT_INCLUDE_DIR CUDAToolkit_FOUND)
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_LIBRARY)
if(TensorRT_FOUND AND NOT TARGET TensorRT::TensorRT)
  add_library(TensorRT::TensorRT UNKNOWN IMPORTED)
  set_target_properties(TensorRT::TensorRT PROPERTIES
    IMPORTED_LOCATION "${TensorRT_LIBRARY}" INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR}"
    INTERFACE_LINK_LIBRARIES CUDA::cudart)
endif()
