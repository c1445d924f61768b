// nanobind's own library, compiled into the extension from the sources that its Python package ships.
#include <nb_combined.cpp>
