"""The rows of point networks for the MODELS table: name -> (builder, description, input).

All take `[B, C, N]`, coordinates in the first three channels. Segmentation returns `[B, num_classes, N]`, `_cls` whole
clouds `[B, num_classes]`, the frustum networks a dict (frustum.py; their input ends with the one-hot class). Channels:
S3DIS 9 (block coordinates, colour, place in the room); ShapeNet 22 (coordinates, normals, one-hot shape), of which each
network uses those it supports; frustums 4 + 3.
"""

from collections.abc import Callable

from torch import nn

from slimray.models.points import dgcnn, frustum, pointcnn, pointnet, pvcnn, unet3d

POINT_MODELS: dict[str, tuple[Callable[..., nn.Module], str, str]] = {
    "pointnet_s3dis": (pointnet.pointnet_s3dis, "PointNet for scenes", "points"),
    "pvcnn_s3dis": (pvcnn.pvcnn_s3dis, "PVCNN for scenes", "points"),
    "pvcnnpp_s3dis": (pvcnn.pvcnnpp_s3dis, "PVCNN++: PointNet++ with PVConvs, for scenes", "points"),
    "dgcnn_s3dis": (dgcnn.dgcnn_s3dis, "DGCNN for scenes", "points"),
    "unet3d_s3dis": (unet3d.unet3d_s3dis, "3D U-Net over voxels for scenes, our own definition", "points"),
    "pointnet_shapenet": (pointnet.pointnet_shapenet, "PointNet for parts", "points"),
    "pointnetpp_ssg_shapenet": (pointnet.pointnetpp_ssg_shapenet, "PointNet++ for parts, one scale", "points"),
    "pointnetpp_msg_shapenet": (pointnet.pointnetpp_msg_shapenet, "PointNet++ for parts, several scales", "points"),
    "pvcnn_shapenet": (pvcnn.pvcnn_shapenet, "PVCNN for parts", "points"),
    "dgcnn_shapenet": (dgcnn.dgcnn_shapenet, "DGCNN for parts", "points"),
    "pointcnn_shapenet": (pointcnn.pointcnn_shapenet, "PointCNN for parts", "points"),
    "unet3d_shapenet": (unet3d.unet3d_shapenet, "3D U-Net over voxels for parts, our own definition", "points"),
    "frustum_pointnet": (frustum.frustum_pointnet, "Frustum PointNet: boxes from frustums", "frustum"),
    "frustum_pointnetpp": (frustum.frustum_pointnetpp, "Frustum PointNet++: boxes from frustums", "frustum"),
    "frustum_pvcnne": (frustum.frustum_pvcnne, "Frustum PVCNN, efficient: PVConvs for the mask only", "frustum"),
    "frustum_pvcnn_complete": (
        frustum.frustum_pvcnn_complete,
        "Frustum PVCNN, complete: PVConvs in all three networks, our own definition",
        "frustum",
    ),
    "pointnet_cls": (pointnet.pointnet_cls, "PointNet for whole clouds", "points"),
    "pvcnn_cls": (pvcnn.pvcnn_cls, "PVCNN for whole clouds, our own definition", "points"),
}
