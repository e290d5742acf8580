/// Which files beside itself an ONNX graph reads; as nova_export/onnx_files.py.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace nova {

/// Every location of external data in a serialized model, as written. std::invalid_argument: no model.
std::set<std::string> external_files(std::string_view model);

} // namespace nova
